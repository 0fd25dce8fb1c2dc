"""The excitation of the vocoder: harmonics of the pitch plus noise, mixed to one signal.

The reference also draws a random initial phase for each harmonic. It is added to a sample that the following
resampling never reads, so it has no effect and is omitted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from light_tts.models.checkpoint.config import HiftConfig


class SourceModule(nn.Module):
    """Parameter names are the checkpoint's: `l_linear` mixes the harmonics."""

    def __init__(self, config: HiftConfig, samples_per_frame: int) -> None:
        super().__init__()
        self.sample_rate = config.sampling_rate
        self.samples_per_frame = samples_per_frame
        self.waves = config.nb_harmonics + 1  # the fundamental and its overtones
        self.amplitude = config.nsf_alpha  # of each sine
        self.noise_level = config.nsf_sigma  # where the pitch is above voiced_threshold (Hz)
        self.voiced_threshold = config.nsf_voiced_threshold
        self.l_linear = nn.Linear(self.waves, 1)

    def turns(self, f0: Tensor) -> Tensor:
        """f0: (batch, frames) in Hz -> turns of each harmonic in one sample (batch, waves, frames)."""
        multiples = torch.arange(1, self.waves + 1, device=f0.device)
        return (f0.unsqueeze(1) * multiples[:, None]) / self.sample_rate % 1

    def radians(self, total: Tensor) -> Tensor:
        """total: (batch, waves, frames) sums of `turns` -> phase at each frame, of the same shape."""
        return total * (2 * math.pi) * self.samples_per_frame

    def sines(self, f0: Tensor) -> Tensor:
        """f0: (batch, frames) in Hz -> harmonics (batch, samples, waves), voiced or not.

        The phase is summed per frame and interpolated linearly in between. float32 throughout: the rounding
        of large phases is part of what the reference computes.
        """
        phase = self.radians(torch.cumsum(self.turns(f0), dim=2))
        phase = F.interpolate(phase, scale_factor=float(self.samples_per_frame), mode="linear")
        return self.amplitude * torch.sin(phase).transpose(1, 2)

    def voiced(self, f0: Tensor) -> Tensor:
        """f0: (batch, frames) -> 1 where voiced, else 0: (batch, samples, 1)."""
        voiced = (f0 > self.voiced_threshold).to(f0.dtype)
        return voiced.repeat_interleave(self.samples_per_frame, dim=1).unsqueeze(2)

    def forward(self, f0: Tensor, noise: Tensor | None) -> Tensor:
        """f0: (batch, frames) in Hz; noise: (batch, samples, waves), None: zero -> source signal (batch,
        samples)."""
        return self.mix(self.sines(f0), f0, noise)

    def mix(self, sines: Tensor, f0: Tensor, noise: Tensor | None) -> Tensor:
        """sines: (batch, samples, waves), voiced or not; otherwise as in `forward`."""
        voiced = self.voiced(f0)
        waves = sines * voiced
        if noise is not None:
            waves = waves + noise * (voiced * self.noise_level + (1 - voiced) * self.amplitude / 3)
        return torch.tanh(self.l_linear(waves)).squeeze(2)
