"""The causal HiFT on the kernels of `light_tts.kernels.vocoder`, for windows of parts.

A window is computed as if the part started with it. That changes the first `context` frames after its start,
which must not be used unless the part does start there. The pitch is computed in float64, as by `CausalHift`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from light_tts.kernels.vocoder.causal_source import Span, causal_phase, causal_samples
from light_tts.kernels.vocoder.layout import Convolutions, repeated
from light_tts.kernels.vocoder.source import Draws
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.decoder import Decoder
from light_tts.models.vocoder.parts import bias_of, exact, extra, levels, mix, voicing


@dataclass(frozen=True)
class Bounds:
    """Positions in each item's window in mel frames, all (batch,) int32. known: number of mel frames; source:
    the frames whose source is computed; decoded: number of frames of the waveform, at most as many as have a
    source."""

    known: Tensor
    source: Span
    decoded: Tensor


class CausalNetwork:
    """Holds its own copy of the weights. `dtype`: see `HiftNetwork`."""

    def __init__(self, hift: CausalHift, dtype: torch.dtype = torch.float16) -> None:
        source = hift.m_source
        self.device = hift.conv_pre.weight.device
        self.waves = source.waves
        self.samples_per_frame = hift.samples_per_frame
        self.mels = hift.config.in_channels
        self.reach = hift.reach
        self._voicing = voicing(source)
        self._mix_weight, self._mix_bias = mix(source)
        self._pitch = [_Layer.of(conv) for conv in hift.f0_predictor.condnet[::2]]
        self._pitch_head = hift.f0_predictor.classifier

        def up(level: int) -> Convolutions:
            conv, rate = hift.ups[level], hift.config.upsample_rates[level]
            return repeated(conv.weight.detach(), bias_of(conv), rate, shift=extra(hift, level), exact=True)

        self._decode = Decoder(
            hift,
            exact(hift.conv_pre, _none),
            levels(hift, up, _causal, dtype),
            exact(hift.conv_post, _causal),
        )

    @torch.inference_mode()
    def __call__(
        self,
        mel: Tensor,
        bounds: Bounds,
        before: Tensor,
        draws: Draws,
        source: Tensor,
        after: Tensor,
        wave: Tensor,
    ) -> None:
        """mel: (batch, frames, mel channels); before, after: (batch, waves) float64, the sums of turns before
        and after the source's frames; source, wave: (batch, samples), both written. `source` must be given up
        to the frames that are computed; the waveform is zero beyond `decoded`."""
        f0 = self.pitch(mel, bounds.known)
        phase = f0.new_empty(*f0.shape, self.waves)
        causal_phase(f0, bounds.source, before, self._voicing, phase, after)
        causal_samples(
            f0, phase, bounds.source, self._mix_weight, self._mix_bias, self._voicing, draws, source
        )
        self._decode(mel, bounds.known, source, bounds.decoded, wave)

    def pitch(self, mel: Tensor, known: Tensor) -> Tensor:
        """mel: (batch, frames, mel channels), of which `known` ones count -> (batch, frames) in Hz."""
        outside = torch.arange(mel.shape[1], device=mel.device) >= known[:, None]
        x = mel.double().masked_fill(outside.unsqueeze(2), 0.0)
        for index, layer in enumerate(self._pitch):
            x = F.elu(layer(x, ahead=index == 0))
        return self._pitch_head(x).squeeze(2).abs().to(mel.dtype)


@dataclass(frozen=True)
class _Layer:
    """A convolution as one product of matrices. weight: (out, taps * in); bias: (out,)."""

    taps: int
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, conv: nn.Conv1d) -> _Layer:
        weight = conv.weight.detach().permute(0, 2, 1).flatten(1).contiguous()
        return cls(conv.kernel_size[0], weight, bias_of(conv))

    def __call__(self, x: Tensor, ahead: bool) -> Tensor:
        """x: (batch, frames, in) -> (batch, frames, out). ahead: all other frames that an output frame sees
        are after it, else before it."""
        others = self.taps - 1
        padded = F.pad(x, (0, 0, 0, others) if ahead else (0, 0, others, 0))
        return F.linear(padded.unfold(1, self.taps, 1).transpose(2, 3).flatten(2), self.weight, self.bias)


def _none(conv: nn.Conv1d) -> int:
    return 0


def _causal(conv: nn.Conv1d) -> int:
    """Return the number of frames that a convolution sees before the output's own; one with a stride also
    sees as many as that after it."""
    return conv.stride[0] - 1 if conv.stride[0] > 1 else conv.dilation[0] * (conv.kernel_size[0] - 1)
