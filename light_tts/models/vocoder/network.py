"""HiFT on the kernels of `light_tts.kernels.hift_*`: computes `Hift.inference` in about fifty launches.

Frames are channels-last. The residual blocks multiply float16 frames and weights; their running sums and
everything else are float32 (as three TF32 products on tensor cores). Compared with float32 that changes the
waveform by about 5e-4 of its level. Nothing is read back from the device and no shape depends on the lengths,
so that the whole can be recorded as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from light_tts.kernels.vocoder.conv import convolve
from light_tts.kernels.vocoder.layout import Active, Convolutions, Frames, Taps
from light_tts.kernels.vocoder.mean import mean_leaky_relu
from light_tts.kernels.vocoder.source import Cached, Draws, Voicing, source_phase, source_samples
from light_tts.kernels.vocoder.spectrum import Transform, istft, stft
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.parts import exact, levels

LAST_SLOPE = 0.01  # of the leaky ReLU before `conv_post`: PyTorch's default


class HiftNetwork:
    """Holds its own copy of the weights. `dtype`: type of the products in the residual blocks: float16, or
    float32 for TF32."""

    def __init__(self, hift: Hift, dtype: torch.dtype = torch.float16) -> None:
        source = hift.m_source
        self.device = hift.conv_pre.weight.device
        self.waves = source.waves
        self.samples_per_frame = hift.samples_per_frame
        self.mels = hift.config.in_channels
        self._slope, self._limit = hift.config.lrelu_slope, hift.config.audio_limit
        self._voicing = Voicing(
            source.sample_rate,
            source.samples_per_frame,
            source.amplitude,
            source.noise_level,
            source.voiced_threshold,
        )
        self._mix_weight = source.l_linear.weight.detach().flatten().contiguous()
        self._mix_bias = source.l_linear.bias.detach()
        self._pitch = [exact(conv) for conv in hift.f0_predictor.condnet[::2]]
        head = hift.f0_predictor.classifier
        self._pitch_head = Convolutions(
            [head.weight.detach().T[None]], head.bias.detach()[None], [Taps(1)], exact=True
        )
        self._pre, self._post = exact(hift.conv_pre), exact(hift.conv_post)
        self._levels = levels(hift, dtype)
        self._transform = Transform.of(hift.n_fft, hift.hop, hift.spectrum_frames, self.device)

    @torch.inference_mode()
    def __call__(
        self, mel: Tensor, lengths: Tensor, draws: Draws, cached: Cached, source: Tensor, wave: Tensor
    ) -> None:
        """mel: (batch, frames, mel channels); lengths: (batch,) int32, 0 for an unused row; source, wave:
        (batch, samples), both written: beyond an item's end the waveform is zero and the source is undefined.
        """
        f0 = self.pitch(mel, lengths)
        phase = f0.new_empty(*f0.shape, self.waves)
        source_phase(f0, lengths, self._voicing, phase)
        source_samples(
            f0, phase, lengths, self._mix_weight, self._mix_bias, self._voicing, draws, cached, source
        )
        self.decode(mel, source, lengths, wave)

    def pitch(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """mel: (batch, frames, mel channels) -> (batch, frames) in Hz, undefined beyond an item's end."""
        level, x = Frames(lengths), mel[None]
        for conv in self._pitch:
            before, x = x, x.new_empty(*x.shape[:3], conv.channels_out)
            convolve(conv, before, level, level, None, Active("elu", x))
        f0 = x.new_empty(*x.shape[:3], 1)
        convolve(self._pitch_head, x, level, level, None, Active("abs", f0))
        return f0.view(f0.shape[1:3])

    def decode(self, mel: Tensor, source: Tensor, lengths: Tensor, wave: Tensor) -> None:
        """mel: (batch, frames, mel channels), source: (batch, samples) -> waveform (batch, samples), zero
        beyond an item's end."""
        batch, frames, _ = mel.shape
        below, top = Frames(lengths), Frames(lengths, self._transform.frames, 1)
        spectrum = mel.new_empty(1, batch, frames * top.rate + 1, self._transform.forward.shape[1])
        stft(source, lengths, self._transform, spectrum[0])
        x = mel.new_empty(1, batch, frames, self._pre.channels_out)
        convolve(self._pre, mel[None], below, below, None, Active("leaky_relu", x, slope=self._slope))
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
