"""The causal HiFT, the vocoder of CosyVoice3.

Apart from a few frames to the right that the pitch and the first convolution see, every sample depends on
earlier frames alone, and on a bounded number of them. Each function therefore takes either a whole part or a
later section of one, with as much context on its left as it needs:

- first: the section starts where the part starts; zeros are added on the left of every convolution.
- otherwise no zeros are added, and every convolution returns fewer frames than it was given. All results end
  at the same time, so two of different lengths are aligned at their ends.
- final: the section ends where the part ends; otherwise its last frames serve only as context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from light_tts.models.checkpoint.cosyvoice3_config import CausalHiftConfig, Config3
from light_tts.models.checkpoint.weights import on_meta
from light_tts.models.vocoder.causal_source import CausalSource
from light_tts.models.vocoder.f0 import CausalF0Predictor
from light_tts.models.vocoder.hift import ResidualPairs, load_hift
from light_tts.models.vocoder.spectrum import Transform

POST_KERNEL = 7


@dataclass(frozen=True)
class Reach:
    """How far samples depend on mel frames. lookahead: frames after a frame that its pitch depends on; held:
    see `CausalHift.held_frames`; context: the frames before the first new sample that suffice for mel, source
    and pitch."""

    lookahead: int
    held: int
    context: int


class CausalResBlock(ResidualPairs):
    """`ResBlock` with convolutions that see earlier frames only, `context` of them altogether."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__(channels, kernel, dilations, padded=False)
        self.context = (kernel - 1) * (sum(dilations) + len(dilations))

    def forward(self, x: Tensor, first: bool) -> Tensor:
        """x: (batch, channels, frames) -> the same, without the first `context` frames if not first."""
        for snake1, conv1, snake2, conv2 in self.pairs():
            x = _sum([x, _causal(conv2, snake2(_causal(conv1, snake1(x), first)), first)])
        return x


class CausalHift(nn.Module):
    """Parameter names are the checkpoint's until `from_checkpoint` has folded the weight norm. The pitch is
    computed in float64: the phase is a long sum of it, which must not depend on how it was rounded.

    held_frames: mel frames at the end of a section that is not final for which it returns no samples;
    mel_context, source_context: what `decode` needs before the first new sample, in frames and in samples."""

    def __init__(self, config: CausalHiftConfig) -> None:
        super().__init__()
        self.config = config
        self.transform = Transform(config.istft_n_fft, config.istft_hop_len)
        self.spectrum_frames = math.prod(config.upsample_rates)  # frames of the small STFT per mel frame
        self.samples_per_frame = self.spectrum_frames * config.istft_hop_len
        inputs, bins = config.base_channels, 2 * self.transform.bins

        self.m_source = CausalSource(config, self.samples_per_frame)
        self.conv_pre: Any = weight_norm(
            nn.Conv1d(config.in_channels, inputs, config.conv_pre_look_right + 1)
        )
        self.ups: Any = nn.ModuleList()
        self.source_downs: Any = nn.ModuleList()
        self.source_resblocks: Any = nn.ModuleList()
        self.resblocks: Any = nn.ModuleList()
        for level, kernel in enumerate(config.upsample_kernel_sizes):
            width = inputs // 2
            self.ups.append(weight_norm(nn.Conv1d(inputs, width, kernel)))
            # The source's spectrum has the frame rate of the last level.
            rate = math.prod(config.upsample_rates[level + 1 :])
            self.source_downs.append(nn.Conv1d(bins, width, 2 * rate if rate > 1 else 1, rate))
            self.source_resblocks.append(
                CausalResBlock(
                    width,
                    config.source_resblock_kernel_sizes[level],
                    config.source_resblock_dilation_sizes[level],
                )
            )
            for size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(CausalResBlock(width, size, dilations))
            inputs = width
        self.conv_post: Any = weight_norm(nn.Conv1d(inputs, bins, POST_KERNEL))
        self.f0_predictor = CausalF0Predictor(
            config.f0_in_channels, config.f0_cond_channels, config.f0_num_class
        ).double()
        # One frame more, because the last samples of the inverse transform lack windows.
        self.held_frames = self.f0_predictor.lookahead + config.conv_pre_look_right + 1
        self.mel_context, self.source_context = self._contexts()
        source_frames = -(-self.source_context // self.samples_per_frame)
        self.reach = Reach(
            self.f0_predictor.lookahead,
            self.held_frames,
            max(self.mel_context, source_frames, self.f0_predictor.context),
        )

    @classmethod
    def from_checkpoint(cls, model_dir: Path, config: Config3, device: torch.device | str) -> CausalHift:
        """Load `<model_dir>/hift.pt`. Raises CheckpointError."""
        with on_meta():
            hift = cls(config.hift)
        return load_hift(hift, model_dir, device)

    @torch.inference_mode()
    def inference(
        self, mel: Tensor, final: bool = True, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """mel: (batch, mel channels, frames) from the start of a part; noise: uniform in [0, 1) (batch,
        samples, harmonics + 1), None: zero -> waveform and source, both (batch, samples)."""
        f0 = self.f0(mel, final=final)
        source = self.m_source(f0, noise)
        return self.decode(mel[:, :, : f0.shape[1]], source, final=final), source

    def f0(self, mel: Tensor, first: bool = True, final: bool = True) -> Tensor:
        """Return the pitch in Hz (batch, frames), see `CausalF0Predictor`."""
        return self.f0_predictor(mel.double(), first, final).to(mel.dtype)

    def decode(self, mel: Tensor, source: Tensor, first: bool = True, final: bool = True) -> Tensor:
        """mel: (batch, mel channels, frames), source: (batch, samples), both up to the same time -> waveform
        (batch, samples): up to that time if final, else `conv_pre_look_right + 1` frames less. If not first,
        `source` starts `source_context` samples and `mel` `mel_context` frames before the first sample
        that the caller needs; the waveform may start earlier."""
        config, bins = self.config, self.transform.bins
        spectrum = self.source_spectrum(source, first, final)
        x = self.conv_pre(F.pad(mel, (0, config.conv_pre_look_right)) if final else mel)
        for level, rate in enumerate(config.upsample_rates):
            x = F.leaky_relu(x, config.lrelu_slope).repeat_interleave(rate, dim=2)
            x = _causal(self.ups[level], x, first)
            if first and level == len(config.upsample_rates) - 1:
                # the spectrum has one more frame, since both ends are frame centres
                x = F.pad(x, (1, 0), mode="reflect")
            excitation = self.source_resblocks[level](self._down(level, spectrum, first), first)
            x = _sum([x, excitation])
            blocks = self._blocks(level)
            x = _sum([block(x, first) for block in blocks]) / len(blocks)
        x = _causal(self.conv_post, F.leaky_relu(x), first)
        wave = self.transform.inverse(torch.exp(x[:, :bins]), torch.sin(x[:, bins:]))
        if not first:
            wave = wave[:, self._overlap * config.istft_hop_len :]
        if not final:
            wave = wave[:, : -self.samples_per_frame]
        return wave.clamp(-config.audio_limit, config.audio_limit)

    def source_spectrum(self, source: Tensor, first: bool = True, final: bool = True) -> Tensor:
        """source: (batch, samples) -> real and imaginary parts (batch, 2 * bins, spectrum frames). Windows
        are centred on frames; the source is reflected at the ends of the part."""
        half = self.transform.n_fft // 2
        if not final:
            source = source[:, : half - self.config.conv_pre_look_right * self.samples_per_frame]
        padding = (half if first else 0, half if final else 0)
        return self.transform.forward(F.pad(source, padding, mode="reflect"))

    @property
    def _overlap(self) -> int:
        """The number of spectrum frames before a frame's centre that reach the samples after it."""
        return (self.transform.n_fft // 2 - 1) // self.transform.hop

    def _blocks(self, level: int) -> list[CausalResBlock]:
        branches = len(self.config.resblock_kernel_sizes)
        return list(self.resblocks[level * branches : (level + 1) * branches])

    def _down(self, level: int, spectrum: Tensor, first: bool) -> Tensor:
        """Return the spectrum at the frame rate of a level. A frame sees the spectrum's frame at the same
        time, `stride` after it (none if the rates are equal), and `stride - 1` before it."""
        conv = self.source_downs[level]
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        if first:
            return conv(F.pad(spectrum, (stride - 1, 0)))
        return conv(spectrum[:, :, (spectrum.shape[2] - kernel) % stride :])

    def _contexts(self) -> tuple[int, int]:
        """Return `mel_context` and `source_context`: the frames needed before a time at which a mel frame
        starts, from the last layer to the first."""
        frames = self._overlap + _context(self.conv_post)
        source = 0
        for level in reversed(range(len(self.ups))):
            frames += max(block.context for block in self._blocks(level))
            excitation = frames + self.source_resblocks[level].context
            stride = self.source_downs[level].stride[0]
            spectrum = excitation * stride + stride - 1
            source = max(source, spectrum * self.transform.hop + self.transform.n_fft // 2)
            if level == len(self.ups) - 1:
                frames += 1  # its frames are those of the spectrum, one later
            frames = -(-(frames + _context(self.ups[level])) // self.config.upsample_rates[level])
        return frames, source


def _context(conv: nn.Conv1d) -> int:
    """Return the number of frames before a frame that a causal convolution sees."""
    return conv.dilation[0] * (conv.kernel_size[0] - 1)


def _causal(conv: nn.Conv1d, x: Tensor, first: bool) -> Tensor:
    return conv(F.pad(x, (_context(conv), 0)) if first else x)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors (batch, channels, frames) that end at the same time, over the frames that all
    of them have."""
    frames = min(part.shape[2] for part in parts)
    return reduce(torch.add, [part[:, :, part.shape[2] - frames :] for part in parts])
