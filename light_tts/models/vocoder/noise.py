"""The noise of the source, drawn at the positions of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from light_tts.models.vocoder.interface import SourceNoise

BLOCK = 32768  # numbers: they fit in a processor's cache, since one takes up to fifty operations

Draw = Callable[[int, int, Tensor], Tensor]  # a distribution in light_tts.common.random


def source_noise(
    draw: Draw, noises: Sequence[SourceNoise | None], samples: int, waves: int, device: torch.device
) -> Tensor | None:
    """Return (items, samples, waves) float32, zero for an item without noise; None if no item has any."""
    if not any(noises):
        return None
    places = torch.arange(samples * waves, device=device)
    rows = [
        torch.zeros(samples * waves, device=device)
        if noise is None
        else _drawn(draw, noise, places + noise.first_sample * waves)
        for noise in noises
    ]
    return torch.stack(rows).view(len(rows), samples, waves)


def _drawn(draw: Draw, noise: SourceNoise, places: Tensor) -> Tensor:
    return torch.cat([draw(noise.seed, noise.stream, block) for block in places.split(BLOCK)])
