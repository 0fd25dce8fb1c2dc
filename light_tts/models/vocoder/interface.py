"""What turns mel spectrograms into waves, as the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from light_tts.common import random


@dataclass(frozen=True)
class SourceNoise:
    """The noise of one item's source: a function of seed, part, and place in the part. first_sample: place of
    the item's first sample."""

    seed: int
    part: int
    first_sample: int

    @property
    def stream(self) -> int:
        return random.stream_of(random.Purpose.SOURCE, self.part)


class Vocoder(Protocol):
    def speak(
        self,
        mel: Tensor,
        lengths: Sequence[int],
        cache_source: Sequence[Tensor | None],
        noises: Sequence[SourceNoise | None],
    ) -> tuple[Tensor, Tensor]:
        """mel: (batch, mel channels, frames) float32 on the device; for each item: its frames, the samples
        that its source shall begin with (None: none), its noise (None: none) -> wave and source, both (batch,
        samples) float32 and the caller's own; beyond an item's end the wave is zero and the source means
        nothing. An item's samples do not depend on its neighbours."""
        ...

    def warm_up(self, items: int) -> None:
        """Do what a first batch of up to `items` would have to wait for."""
        ...
