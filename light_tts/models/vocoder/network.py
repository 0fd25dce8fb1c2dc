"""HiFT on the kernels of `light_tts.kernels.vocoder`: computes `Hift.inference` in about fifty launches."""

from __future__ import annotations

import torch
from torch import Tensor

from light_tts.kernels.vocoder.conv import convolve
from light_tts.kernels.vocoder.layout import Active, Convolutions, Frames, Taps, transposed
from light_tts.kernels.vocoder.source import Cached, Draws, source_phase, source_samples
from light_tts.models.vocoder.decoder import Decoder
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.parts import bias_of, centred, exact, extra, levels, mix, voicing


class HiftNetwork:
    """Holds its own copy of the weights. `dtype`: type of the products in the residual blocks: float16, or
    float32 for TF32."""

    def __init__(self, hift: Hift, dtype: torch.dtype = torch.float16) -> None:
        source = hift.m_source
        self.device = hift.conv_pre.weight.device
        self.waves = source.waves
        self.samples_per_frame = hift.samples_per_frame
        self.mels = hift.config.in_channels
        self._voicing = voicing(source)
        self._mix_weight, self._mix_bias = mix(source)
        self._pitch = [exact(conv, centred) for conv in hift.f0_predictor.condnet[::2]]
        head = hift.f0_predictor.classifier
        self._pitch_head = Convolutions(
            [head.weight.detach().T[None]], head.bias.detach()[None], [Taps(1)], exact=True
        )

        def up(level: int) -> Convolutions:
            conv, moved = hift.ups[level], extra(hift, level)
            weight, bias = conv.weight.detach(), bias_of(conv)
            return transposed(weight, bias, conv.stride[0], conv.padding[0], shift=moved, exact=True)

        self._decode = Decoder(
            hift,
            exact(hift.conv_pre, centred),
            levels(hift, up, centred, dtype),
            exact(hift.conv_post, centred),
        )

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
        self._decode(mel, lengths, source, lengths, wave)

    def pitch(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """mel: (batch, frames, mel channels) -> (batch, frames) in Hz, undefined beyond an item's end."""
        level, x = Frames(lengths), mel[None]
        for conv in self._pitch:
            before, x = x, x.new_empty(*x.shape[:3], conv.channels_out)
            convolve(conv, before, level, level, None, Active("elu", x))
        f0 = x.new_empty(*x.shape[:3], 1)
        convolve(self._pitch_head, x, level, level, None, Active("abs", f0))
        return f0.view(f0.shape[1:3])
