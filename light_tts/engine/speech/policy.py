"""Which waiting work is done next: first chunks first, then whoever's client runs dry soonest.

Pure: knows nothing of tensors, messages or time other than the clock it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

PADDING_LIMIT = 1.5  # a batch may cost so many times the work of its items alone
# Mel frames of a packed batch. More would hardly be faster, and what arrives meanwhile waits for all of it; a
# batch with a first chunk, whose client hears nothing yet, is kept short.
PACKED_FRAMES = 8192
SHORT_FRAMES = 2048
# What may wait for the end of first chunks in work: a stream whose client has audio for longer than this
# (seconds), and an answer in one piece until it has waited for so long.
ENOUGH_AUDIO = 0.5
LONGEST_WAIT = 0.25


@dataclass(frozen=True)
class Waiting:
    """A chunk that can be spoken. `since`: when it could first; `stream`: the client hears it at once;
    `masked`: the flow's attention, which must agree in a batch; `frames`: its length for the flow."""

    job: Hashable
    since: float
    stream: bool
    masked: bool
    frames: int


class DeadlinePolicy:
    """Keeps for each job until when its client has audio to play (its deadline). A job that has none and is
    not waited for by a player is due since it was ready. `packed`: a batch is not padded, so that any chunks
    may share it. `firsts_alone`: batches in work hold one another up, so that first chunks should have no
    others beside them."""

    def __init__(
        self,
        sample_rate: int,
        clock: Callable[[], float],
        packed: bool = False,
        firsts_alone: bool = False,
    ) -> None:
        self._packed = packed
        self._firsts_alone = firsts_alone
        self._sample_rate = sample_rate
        self._clock = clock
        self._dry_at: dict[Hashable, float] = {}

    def resumed(self, job: Hashable) -> None:
        """The client of this new job has heard its beginning already: it may be dry now."""
        self._dry_at[job] = self._clock()

    def delivered(self, job: Hashable, samples: int) -> None:
        """Audio was sent to the client; a client that was dry plays it from now on."""
        now = self._clock()
        self._dry_at[job] = max(self._dry_at.get(job, now), now) + samples / self._sample_rate

    def forget(self, job: Hashable) -> None:
        self._dry_at.pop(job, None)

    def order(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Most urgent first."""
        return sorted(waiting, key=self._urgency)

    def is_first(self, chunk: Waiting) -> bool:
        """Whether its client waits for it in silence."""
        return chunk.stream and chunk.job not in self._dry_at

    def next_batch(
        self,
        waiting: Sequence[Waiting],
        limit: int,
        short: bool = False,
        in_work: Sequence[Waiting] = (),
    ) -> list[Waiting]:
        """The most urgent chunk and up to `limit - 1` more that can share its batch, in order of urgency;
        empty where nothing waits, or where all of it can wait for the end of first chunks `in_work`.
        `short`: packed batches so short that first chunks may wait for them."""
        beside_first = self._firsts_alone and any(map(self.is_first, in_work))
        if beside_first and all(map(self._can_wait, waiting)):
            return []
        batch: list[Waiting] = []
        for chunk in self.order(waiting):
            if len(batch) < limit and (not batch or self._may_join(chunk, batch, short)):
                batch.append(chunk)
        return batch

    def _may_join(self, chunk: Waiting, batch: list[Waiting], short: bool) -> bool:
        frames = [other.frames for other in batch] + [chunk.frames]
        if self._packed:
            short = (short or self.is_first(batch[0])) and not self.is_first(chunk)
            return sum(frames) <= (SHORT_FRAMES if short else PACKED_FRAMES)
        padded = max(frames) * len(frames)
        return chunk.masked == batch[0].masked and padded <= PADDING_LIMIT * sum(frames)

    def _can_wait(self, chunk: Waiting) -> bool:
        now = self._clock()
        if not chunk.stream:
            return now < chunk.since + LONGEST_WAIT
        return not self.is_first(chunk) and now + ENOUGH_AUDIO < self._dry_at[chunk.job]

    def _urgency(self, chunk: Waiting) -> tuple[bool, float]:
        dry_at = self._dry_at.get(chunk.job)
        return not self.is_first(chunk), chunk.since if dry_at is None or not chunk.stream else dry_at
