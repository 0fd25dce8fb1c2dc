"""HiFT, the vocoder: mel spectrogram -> waveform, via a source signal and an inverse STFT.

Takes padded batches. Everything beyond an item's length is set to zero before every convolution, which equals
the padding the item would have alone, so its samples do not depend on the other items.

Lengths are numbers on the host, or a tensor on the model's device; in that case nothing is read back, as a
CUDA graph requires.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from light_tts.models.checkpoint.config import HiftConfig
from light_tts.models.checkpoint.cosyvoice2_config import Config
from light_tts.models.checkpoint.weights import load_into, load_state_dict, on_meta
from light_tts.models.vocoder.f0 import F0Predictor
from light_tts.models.vocoder.source import SourceModule
from light_tts.models.vocoder.spectrum import Transform

FILE_NAME = "hift.pt"

Model = TypeVar("Model", bound=nn.Module)
Lengths = Sequence[int] | Tensor  # (batch,)


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """Return x + sin^2(alpha x) / alpha, which is zero at zero."""
    return x + torch.sin(x * alpha).square() / (alpha + 1e-9)


class Snake(nn.Module):
    """`snake` with an alpha per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.alpha[:, None])


class ResidualPairs(nn.Module):
    """Pairs of a dilated and a plain convolution, each preceded by a snake activation. padded: the
    convolutions add zeros at both ends, so that the number of frames stays the same."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], padded: bool) -> None:
        super().__init__()
        self.kernel_size = kernel

        def conv(dilation: int) -> nn.Module:
            padding = dilation * (kernel - 1) // 2 if padded else 0
            return weight_norm(nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding))

        self.convs1: Any = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2: Any = nn.ModuleList(conv(1) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def pairs(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yield the modules of each pair in the order in which they are applied."""
        return zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)


class ResBlock(ResidualPairs):
    """Adds what each pair returns to what it was given."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__(channels, kernel, dilations, padded=True)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (batch, channels, frames), zero in the padding -> the same."""
        for snake1, conv1, snake2, conv2 in self.pairs():
            x = x + _masked(conv2(snake2(_masked(conv1(snake1(x)), mask))), mask)
        return x


class Hift(nn.Module):
    """Parameter names are the checkpoint's until `from_checkpoint` has folded the weight norm."""

    def __init__(self, config: HiftConfig) -> None:
        super().__init__()
        self.config = config
        self.n_fft, self.hop = config.istft_n_fft, config.istft_hop_len
        self.transform = Transform(self.n_fft, self.hop)
        self.spectrum_frames = math.prod(config.upsample_rates)  # frames of the small STFT per mel frame
        self.samples_per_frame = self.spectrum_frames * self.hop
        bins = self.transform.bins
        channels = [config.base_channels >> level for level in range(len(config.upsample_rates) + 1)]

        self.m_source = SourceModule(config, self.samples_per_frame)
        self.conv_pre = weight_norm(nn.Conv1d(config.in_channels, channels[0], 7, padding=3))
        self.ups: Any = nn.ModuleList(
            weight_norm(nn.ConvTranspose1d(wide, narrow, kernel, rate, padding=(kernel - rate) // 2))
            for wide, narrow, kernel, rate in zip(
                channels, channels[1:], config.upsample_kernel_sizes, config.upsample_rates, strict=False
            )
        )
        self.source_downs: Any = nn.ModuleList()
        self.source_resblocks: Any = nn.ModuleList()
        self.resblocks: Any = nn.ModuleList()
        for level, width in enumerate(channels[1:]):
            # The source's spectrum has the frame rate of the last level.
            rate = math.prod(config.upsample_rates[level + 1 :])
            kernel, padding = (2 * rate, rate // 2) if rate > 1 else (1, 0)
            self.source_downs.append(nn.Conv1d(2 * bins, width, kernel, rate, padding))
            self.source_resblocks.append(
                ResBlock(
                    width,
                    config.source_resblock_kernel_sizes[level],
                    config.source_resblock_dilation_sizes[level],
                )
            )
        for width in channels[1:]:
            for kernel, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(ResBlock(width, kernel, dilations))
        self.conv_post = weight_norm(nn.Conv1d(channels[-1], 2 * bins, 7, padding=3))
        self.f0_predictor = F0Predictor(config.f0_in_channels, config.f0_cond_channels, config.f0_num_class)

    @classmethod
    def from_checkpoint(cls, model_dir: Path, config: Config, device: torch.device | str) -> Hift:
        """Load `<model_dir>/hift.pt` in float32. Raises CheckpointError."""
        with on_meta():
            hift = cls(config.hift)
        return load_hift(hift, model_dir, device)

    @torch.inference_mode()
    def inference(
        self,
        mel: Tensor,
        lengths: Lengths,
        cache_source: Sequence[Tensor | None] | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """mel: (batch, mel channels, frames); lengths: frames of each item; cache_source: for each item the
        samples that its source must start with, or None; noise: standard normal (batch, samples, harmonics +
        1), None: zero -> waveform and source, both (batch, samples). Beyond an item's length the waveform is
        zero and the source is undefined."""
        source = self.m_source(self.f0(mel, lengths), noise)
        for row, cached in enumerate(cache_source or ()):
            if cached is not None:
                source[row, : len(cached)] = cached
        return self.decode(mel, source, lengths), source

    def f0(self, mel: Tensor, lengths: Lengths) -> Tensor:
        """mel: (batch, mel channels, frames) -> pitch in Hz (batch, frames)."""
        mask = _mask(lengths, mel)
        return self.f0_predictor(_masked(mel, mask), mask)

    def decode(self, mel: Tensor, source: Tensor, lengths: Lengths) -> Tensor:
        """mel: (batch, mel channels, frames), source: (batch, samples) -> waveform (batch, samples), zero in
        the padding."""
        lengths = torch.as_tensor(lengths)
        spectrum = self.source_spectrum(source, lengths)
        mask = _mask(lengths, mel)
        x = _masked(self.conv_pre(_masked(mel, mask)), mask)
        rate, last = 1, len(self.ups) - 1
        for level, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.config.lrelu_slope))
            rate *= self.config.upsample_rates[level]
            if level == last:
                # the spectrum has one more frame, since both ends are frame centres
                x = F.pad(x, (1, 0), mode="reflect")
            mask = _mask(lengths * rate + int(level == last), x)
            x = _masked(x, mask)
            excitation = _masked(self.source_downs[level](spectrum), mask)
            x = x + self.source_resblocks[level](excitation, mask)
            branches = len(self.config.resblock_kernel_sizes)
            blocks = self.resblocks[level * branches : (level + 1) * branches]
            x = sum(block(x, mask) for block in blocks) / branches
        x = self.conv_post(F.leaky_relu(x))
        bins = self.transform.bins
        wave = self.istft(torch.exp(x[:, :bins]), torch.sin(x[:, bins:]), lengths * rate + 1)
        return wave.clamp(-self.config.audio_limit, self.config.audio_limit)

    def source_spectrum(self, source: Tensor, lengths: Lengths) -> Tensor:
        """source: (batch, samples) -> real and imaginary parts (batch, 2 * bins, spectrum frames), zero in
        the padding. Centred frames; each item is reflected at its own end."""
        lengths = torch.as_tensor(lengths)
        if _is_full(lengths * self.samples_per_frame, source.shape[1]):
            # no copy to the device, because a CUDA graph may be recorded
            samples: int | Tensor = source.shape[1]
        else:
            samples = lengths.to(source.device)[:, None] * self.samples_per_frame
        half = self.n_fft // 2
        index = torch.arange(-half, source.shape[1] + half, device=source.device).abs()
        index = torch.where(index < samples, index, 2 * (samples - 1) - index).clamp(min=0)
        spectrum = self.transform.forward(source.gather(1, index.expand(len(source), -1)))
        return _masked(spectrum, _mask(lengths * self.spectrum_frames + 1, spectrum))

    def istft(self, magnitude: Tensor, phase: Tensor, frames: Lengths) -> Tensor:
        """magnitude, phase: (batch, bins, spectrum frames); frames: of each item -> waveform (batch,
        samples), zero in the padding."""
        frames = torch.as_tensor(frames)
        wave = self.transform.inverse(magnitude, phase, _mask(frames, magnitude))
        inside = _mask((frames - 1) * self.hop, wave)
        return wave if inside is None else wave * inside.squeeze(1)


def load_hift(hift: Model, model_dir: Path, device: torch.device | str) -> Model:
    """Load `<model_dir>/hift.pt` into a module on the meta device and fold the weight norm. Raises
    CheckpointError."""
    path = Path(model_dir) / FILE_NAME
    load_into(hift, {_current_name(name): value for name, value in load_state_dict(path).items()}, path)
    for module in list(hift.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return hift.to(device).eval().requires_grad_(False)


def _mask(lengths: Lengths, x: Tensor) -> Tensor | None:
    """Return 1 within each item's length: (batch, 1, frames), or None if x (batch, ..., frames) has no
    padding as far as the host knows."""
    lengths = torch.as_tensor(lengths)
    if _is_full(lengths, x.shape[-1]):
        return None
    inside = torch.arange(x.shape[-1], device=x.device) < lengths.to(x.device)[:, None]
    return inside.unsqueeze(1).to(x.dtype)


def _is_full(lengths: Tensor, size: int) -> bool:
    """Return whether the host knows that no item is shorter."""
    return lengths.device.type == "cpu" and int(lengths.min()) >= size


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _current_name(name: str) -> str:
    """Convert names of older files: a `generator.` prefix, and weight norm as `weight_g` and `weight_v`."""
    name = name.removeprefix("generator.")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if name.endswith("." + old):
            return f"{name.removesuffix(old)}parametrizations.weight.{new}"
    return name
