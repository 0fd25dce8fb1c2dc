"""The engine's interface to the vocoder, which converts mel spectrograms to waveforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from light_tts.common import random
from light_tts.common.cuda_graphs import GraphCache


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


class MelBatch(NamedTuple):
    """Input of a vocoder. mel: (batch, mel channels, frames) float32 on the device; for each item: `lengths`:
    its number of frames; `cached`: the samples that its source must start with (None: none); `noises`: its
    noise (None: none)."""

    mel: Tensor
    lengths: Sequence[int]
    cached: Sequence[Tensor | None]
    noises: Sequence[SourceNoise | None]

    def rows(self, rows: slice) -> MelBatch:
        """Return some of the items."""
        return MelBatch(self.mel[rows], self.lengths[rows], self.cached[rows], self.noises[rows])


class Vocoder(Protocol):
    @property
    def graphs(self) -> GraphCache | None:
        """None if nothing is recorded."""

    def speak(self, batch: MelBatch) -> tuple[Tensor, Tensor]:
        """Return waveform and source, both (batch, samples) float32 and owned by the caller; beyond an item's
        end the waveform is zero and the source is undefined. An item's samples do not depend on the other
        items."""
        ...

    def warm_up(self, items: int, first: bool = True) -> None:
        """Do in advance what a first chunk would have to wait for; `graphs` has the rest that batches of up
        to `items` need. `first`: this is the first of the instances that share weights."""
        ...
