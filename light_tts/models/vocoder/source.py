"""The excitation of the vocoder: harmonics of the pitch plus noise, mixed to one signal.

The reference also draws a random initial phase for each harmonic. It is added to a sample that the following
resampling never reads, so it has no effect and is omitted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SourceModule(nn.Module):
    """Parameter names are the checkpoint's: `l_linear` mixes the harmonics."""

    def __init__(
        self,
        sample_rate: int,
        samples_per_frame: int,
        harmonics: int,
        amplitude: float,
        noise_level: float,
        voiced_threshold: float,
    ) -> None:
        """harmonics: overtones besides the fundamental; amplitude: of each sine; noise_level: standard
        deviation of the noise where the pitch is above voiced_threshold (Hz)."""
        super().__init__()
        self.sample_rate = sample_rate
        self.samples_per_frame = samples_per_frame
        self.waves = harmonics + 1
        self.amplitude = amplitude
        self.noise_level = noise_level
        self.voiced_threshold = voiced_threshold
        self.l_linear = nn.Linear(self.waves, 1)

    def sines(self, f0: Tensor) -> Tensor:
        """f0: (batch, frames) in Hz -> harmonics (batch, samples, waves), voiced or not.

        The phase is summed per frame and interpolated linearly in between. float32 throughout: the rounding
        of large phases is part of what the reference computes.
        """
        multiples = torch.arange(1, self.waves + 1, device=f0.device)
        turns = (f0.unsqueeze(1) * multiples[:, None]) / self.sample_rate % 1  # (batch, waves, frames)
        phase = torch.cumsum(turns, dim=2) * (2 * math.pi) * self.samples_per_frame
        phase = F.interpolate(phase, scale_factor=float(self.samples_per_frame), mode="linear")
        return self.amplitude * torch.sin(phase).transpose(1, 2)

    def voiced(self, f0: Tensor) -> Tensor:
        """f0: (batch, frames) -> 1 where voiced, else 0: (batch, samples, 1)."""
        voiced = (f0 > self.voiced_threshold).to(f0.dtype)
        return voiced.repeat_interleave(self.samples_per_frame, dim=1).unsqueeze(2)

    def forward(self, f0: Tensor, noise: Tensor | None) -> Tensor:
        """f0: (batch, frames) in Hz; noise: standard normal (batch, samples, waves), None: zero -> source
        signal (batch, samples)."""
        voiced = self.voiced(f0)
        waves = self.sines(f0) * voiced
        if noise is not None:
            waves = waves + noise * (voiced * self.noise_level + (1 - voiced) * self.amplitude / 3)
        return torch.tanh(self.l_linear(waves)).squeeze(2)
