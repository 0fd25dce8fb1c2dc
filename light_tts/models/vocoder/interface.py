"""The engine's interface to the vocoder, which converts mel spectrograms to waveforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

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


class CausalState:
    """What a causal vocoder keeps of a part between two chunks. Each implementation has a subclass."""


@dataclass(frozen=True)
class CausalItem:
    """The next chunk of one part. mel: (mel channels, frames) float32 on the device, the frames of a part
    after those that made `state`; state: what the previous chunk of the part returned, None: this is the
    first; final: no frames follow (`mel` may then be empty); noise: that of the source, whose `first_sample`
    is not used, None: none."""

    mel: Tensor
    state: CausalState | None
    final: bool
    noise: SourceNoise | None


@runtime_checkable
class CausalVocoder(Protocol):
    """A vocoder that continues a part chunk by chunk."""

    @property
    def held_back(self) -> int:
        """Number of samples that a chunk that is not final keeps for the next one."""

    @property
    def graphs(self) -> GraphCache | None:
        """None if nothing is recorded."""

    def speak(self, items: Sequence[CausalItem]) -> list[tuple[Tensor, CausalState | None]]:
        """Return the new samples of each item, (samples,) float32 on the device, and the state to continue
        from (None after a final one). The samples of all chunks of a part together are those of its whole mel
        at once, whatever the boundaries. States are not changed. An item's samples do not depend on the other
        items."""
        ...

    def warm_up(self, items: int, first: bool = True) -> None:
        """See `Vocoder.warm_up`."""
        ...
