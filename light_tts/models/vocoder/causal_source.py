"""The excitation of the causal vocoder, which can be continued.

It differs from that of `SourceModule` in two ways: the phase is constant within a mel frame, and the noise is
uniform in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from light_tts.models.vocoder.source import SourceModule


class CausalSource(SourceModule):
    """Parameter names are the checkpoint's."""

    def total(self, f0: Tensor, before: Tensor | None = None) -> Tensor:
        """f0: (batch, frames) in Hz; before: (batch, waves) float64, the last totals of the frames before
        these, None: there are none -> sums of `turns` (batch, waves, frames) float64."""
        turns = self.turns(f0).double()
        if before is None:
            return turns.cumsum(dim=2)
        return torch.cat([before.unsqueeze(2), turns], dim=2).cumsum(dim=2)[:, :, 1:]

    def sines(self, f0: Tensor) -> Tensor:
        return self.sines_at(self.total(f0))

    def sines_at(self, total: Tensor) -> Tensor:
        """total: (batch, waves, frames) float64 -> harmonics (batch, samples, waves), voiced or not. Rounds
        the totals to float32 as `SourceModule.sines` does."""
        sines = self.amplitude * torch.sin(self.radians(total.float())).transpose(1, 2)
        return sines.repeat_interleave(self.samples_per_frame, dim=1)
