"""Kernels of the vocoder, over channels-last frames: (branches, batch, frames, channels).

Weights of each branch of a convolution are laid out as (taps, in, out), concatenated to one matrix
(`layout.Convolutions`)."""
