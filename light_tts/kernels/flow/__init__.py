"""Kernels of the flow, over the rows of a packed batch (see packed_conv.py).

Weights are laid out as (in, out), those of a convolution as (taps, in, out), where the last tap is the
current frame. Gain and offset of a LayerNorm are folded into the linear after it
(`layer_norm_linear.fold_layer_norm`)."""
