"""Discriminators of waveforms, which distinguish the teacher's from the vocoder's, and the losses of both.

Period discriminators as in HiFi-GAN (Kong et al., 2020), half to a quarter as wide; spectrogram
discriminators as in UnivNet (Jang et al., 2021). Both are 2-D convolutions, channels last, which suits tensor
cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from training.devices import mixed_precision
from training.vocoder.spectral_losses import magnitudes

PERIODS = (2, 3, 5, 7, 11)
PERIOD_CHANNELS = (16, 64, 256, 256, 256)
RESOLUTIONS = (2048, 1024, 512)
SPECTRUM_CHANNELS = 32
FAINT = 1e-3  # magnitudes below are treated as equal
SLOPE = 0.1

Features = list[Tensor]  # of one discriminator, layer by layer; the last is its output


class Discriminator(nn.Module):
    """Convolutions over an image computed from the waveform."""

    def __init__(self, convs: list[nn.Conv2d]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(weight_norm(conv) for conv in convs)

    def image(self, wave: Tensor) -> Tensor:
        """wave: (batch, samples) -> (batch, 1, height, width) float32"""
        raise NotImplementedError

    def forward(self, wave: Tensor) -> Features:
        x, features = self.image(wave), []
        for conv in self.convs[:-1]:
            x = F.leaky_relu(conv(x.contiguous(memory_format=torch.channels_last)), SLOPE)
            features.append(x)
        return [*features, self.convs[-1](x)]


class PeriodDiscriminator(Discriminator):
    """Compares samples that are `period` apart."""

    def __init__(self, period: int, channels: tuple[int, ...] = PERIOD_CHANNELS) -> None:
        convs, before = [], 1
        for layer, width in enumerate(channels):
            stride = 3 if layer < len(channels) - 1 else 1
            convs.append(nn.Conv2d(before, width, (5, 1), (stride, 1), (2, 0)))
            before = width
        super().__init__([*convs, nn.Conv2d(before, 1, (3, 1), padding=(1, 0))])
        self.period = period

    def image(self, wave: Tensor) -> Tensor:
        wave = F.pad(wave, (0, -wave.shape[1] % self.period), "reflect")
        return wave.view(len(wave), 1, -1, self.period)


class SpectrumDiscriminator(Discriminator):
    """Evaluates log magnitudes: (batch, 1, frames, bins)."""

    def __init__(self, size: int, channels: int = SPECTRUM_CHANNELS) -> None:
        super().__init__(
            [
                nn.Conv2d(1, channels, (3, 9), padding=(1, 4)),
                *(nn.Conv2d(channels, channels, (3, 9), (1, 2), (1, 4)) for _ in range(3)),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.Conv2d(channels, 1, 3, padding=1),
            ]
        )
        self.size = size

    def image(self, wave: Tensor) -> Tensor:
        return (magnitudes(wave, self.size) + FAINT).log().transpose(1, 2).unsqueeze(1)


@dataclass(frozen=True)
class AdversarialLosses:
    """Losses, each summed over all discriminators: `adversarial` and `matching` (of features) are the
    vocoder's, `discriminator` is the discriminators' own."""

    adversarial: Tensor
    matching: Tensor
    discriminator: Tensor


class Discriminators(nn.Module):
    """All discriminators. On a GPU their convolutions compute in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.judges = nn.ModuleList(  # the name in saved weights
            [
                *(PeriodDiscriminator(period) for period in PERIODS),
                *(SpectrumDiscriminator(size) for size in RESOLUTIONS),
            ]
        )
        self._streams: list[torch.cuda.Stream] = []

    def forward(self, wave: Tensor) -> list[Features]:
        """wave: (batch, samples) float32"""
        with mixed_precision(wave.device):
            return [discriminator(wave) for discriminator in self.judges]

    def compare(self, real: Tensor, made: Tensor) -> AdversarialLosses:
        """real, made: (batch, samples) float32. On a GPU each discriminator uses its own stream, forward and
        backward, because a single one does not fill the GPU."""
        both, half = torch.cat([real, made]), len(real)
        if both.device.type != "cuda":
            return self._sum([self._losses(discriminator, both, half) for discriminator in self.judges])
        if not self._streams:
            self._streams = [torch.cuda.Stream(both.device) for _ in self.judges]
        caller, found = torch.cuda.current_stream(both.device), []
        for discriminator, stream in zip(self.judges, self._streams, strict=True):
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                found.append(self._losses(discriminator, both, half))
        for stream in self._streams:
            caller.wait_stream(stream)
        return self._sum(found)

    @staticmethod
    def _losses(discriminator: Discriminator, both: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
        """both: (2 * half, samples), the teacher's first -> adversarial, matching and discriminator loss."""
        with mixed_precision(both.device):
            features = discriminator(both)
        real, made = [[x[:half] for x in features]], [[x[half:] for x in features]]
        given = [[x.detach() for x in real[0]]]
        return adversarial_loss(made), feature_matching_loss(given, made), discriminator_loss(real, made)

    @staticmethod
    def _sum(losses: list[tuple[Tensor, Tensor, Tensor]]) -> AdversarialLosses:
        return AdversarialLosses(*(torch.stack(parts).sum() for parts in zip(*losses, strict=True)))


def discriminator_loss(real: list[Features], made: list[Features]) -> Tensor:
    """Loss of the discriminators: least squares (Mao et al., 2017) with target 1 for the teacher's and 0 for
    the vocoder's waveforms."""
    return sum(
        (1 - ours[-1].float()).square().mean() + theirs[-1].float().square().mean()
        for ours, theirs in zip(real, made, strict=True)
    )


def adversarial_loss(made: list[Features]) -> Tensor:
    """Adversarial loss of the vocoder: least squares with target 1."""
    return sum((1 - features[-1].float()).square().mean() for features in made)


def feature_matching_loss(real: list[Features], made: list[Features]) -> Tensor:
    """Feature matching loss of the vocoder: mean difference of all features before the output, summed over
    layers."""
    return sum(
        (x - y).abs().mean(dtype=torch.float32)
        for ours, theirs in zip(real, made, strict=True)
        for x, y in zip(ours[:-1], theirs[:-1], strict=True)
    )
