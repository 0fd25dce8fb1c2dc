"""The engine's interface to the vocoder, which converts mel spectrograms to waveforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from light_tts.common import random


@dataclass(frozen=True)
class SourceNoise:
    """The noise of one item's source: a function of seed, part, and position in the part. first_sample:
    position of the item's first sample."""

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
        """mel: (batch, mel channels, frames) float32 on the device; for each item: its number of frames, the
        samples that its source must start with (None: none), its noise (None: none) -> waveform and source,
        both (batch, samples) float32 and owned by the caller; beyond an item's end the waveform is zero and
        the source is undefined. An item's samples do not depend on the other items."""
        ...

    def warm_up(self, items: int) -> None:
        """Do in advance what a first batch of up to `items` would have to wait for."""
        ...
