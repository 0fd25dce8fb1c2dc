"""The part of HiFT that follows its source, on the kernels of `light_tts.kernels.vocoder`.

Frames are channels-last. The residual blocks multiply float16 frames and weights; their running sums and
everything else are float32 (as three TF32 products on tensor cores). Compared with float32 that changes the
waveform by about 5e-4 of its level. Nothing is read back from the device and no shape depends on the lengths,
so that the whole can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from light_tts.kernels.vocoder.conv import convolve
from light_tts.kernels.vocoder.layout import Active, Convolutions, Frames
from light_tts.kernels.vocoder.mean import mean_leaky_relu
from light_tts.kernels.vocoder.spectrum import Transform, istft, stft
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.parts import Level

LAST_SLOPE = 0.01  # of the leaky ReLU before `conv_post`: PyTorch's default


class Decoder:
    """Computes a waveform from mel frames and the source. pre, post: the first and the last convolution."""

    def __init__(
        self, hift: Hift | CausalHift, pre: Convolutions, levels: Sequence[Level], post: Convolutions
    ) -> None:
        transform, device = hift.transform, hift.conv_pre.weight.device
        self._slope, self._limit = hift.config.lrelu_slope, hift.config.audio_limit
        self._pre, self._levels, self._post = pre, levels, post
        self._transform = Transform.of(transform.n_fft, transform.hop, hift.spectrum_frames, device)

    def __call__(self, mel: Tensor, known: Tensor, source: Tensor, lengths: Tensor, wave: Tensor) -> None:
        """mel: (batch, frames, mel channels), of which the first convolution sees `known` ones; source:
        (batch, samples); known, lengths: (batch,) int32; wave: (batch, samples), written: `lengths` frames,
        zero beyond them."""
        batch, frames, _ = mel.shape
        below, top = Frames(lengths), Frames(lengths, self._transform.frames, 1)
        spectrum = mel.new_empty(1, batch, frames * top.rate + 1, self._transform.forward.shape[1])
        stft(source, lengths, self._transform, spectrum[0])
        x = mel.new_empty(1, batch, frames, self._pre.channels_out)
        convolve(self._pre, mel[None], Frames(known), below, None, Active("leaky_relu", x, slope=self._slope))
        for level in self._levels:
            here = Frames(lengths, level.rate, level.extra)
            up = x.new_empty(1, batch, frames * here.rate + here.extra, level.up.channels_out)
            convolve(level.up, x, below, here, up, mirror=level.extra == 1)
            excitation = torch.empty_like(up)
            entering = level.excitation.entrance(up)
            convolve(level.down, spectrum, top, here, excitation, entering)
            leaving = level.blocks.entrance(up)
            total = level.excitation(excitation, entering.out, here, addend=up, leaving=leaving)
            sums = level.blocks(total, leaving.out, here)
            slope = LAST_SLOPE if level is self._levels[-1] else self._slope
            x, below = torch.empty_like(up), here
            mean_leaky_relu(sums, slope, x[0])
        post = x.new_empty(1, batch, x.shape[2], self._post.channels_out)
        convolve(self._post, x, top, top, post)
        istft(post[0], lengths, self._transform, self._limit, wave)
