"""Which waiting work is done next: first chunks first, then whoever's client runs dry soonest. But no stream
begins while one that has begun might run dry because of it: where there is more to do than can be done,
streams that have begun are finished before others begin.

Pure: knows nothing of tensors, messages or time other than the clock it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
# An answer in one piece that has waited for so long (seconds) is due as if it were a stream run dry.
PATIENCE = 5.0
# Such an answer is spoken part by part. Each part waits for others so much longer (seconds) than the one
# before it, so that a short answer passes a long one.
LATER_PART = 1.0
# A stream that has begun gets its next chunk with so many batches to spare before another begins: how long
# they take varies, and each stream that begins takes its share of the time for as long as it lasts.
SPARE_BATCHES = 10
WEIGHT_OF_LATEST = 0.2  # in the average duration of batches


@dataclass(frozen=True)
class Waiting:
    """A chunk that can be spoken. `since`: when it could first; `stream`: the client hears it at once;
    `masked`: the flow's attention, which must agree in a batch; `frames`: its length for the flow;
    `part`: the number of its part."""

    job: str
    since: float
    stream: bool
    masked: bool
    frames: int
    part: int = 0


class DeadlinePolicy:
    """Keeps for each stream that has begun until when its client has audio to play (its deadline); an answer
    in one piece is due since it was ready. `packed`: a batch is not padded, so that any chunks may share it.
    `firsts_alone`: batches in work hold one another up, so that first chunks should have no others beside
    them."""

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
        self._dry_at: dict[str, float] = {}
        self._batch_seconds = 0.0  # averages: of a batch, and for each of its chunks
        self._chunk_seconds = 0.0

    def resumed(self, job: str) -> None:
        """The client of this new job has heard its beginning already: it may be dry now."""
        self._dry_at[job] = self._clock()

    def delivered(self, job: str, samples: int) -> None:
        """Audio was sent to the client; a client that was dry plays it from now on."""
        now = self._clock()
        self._dry_at[job] = max(self._dry_at.get(job, now), now) + samples / self._sample_rate

    def took(self, seconds: float, chunks: int) -> None:
        """A batch of so many chunks took so long."""
        self._batch_seconds += WEIGHT_OF_LATEST * (seconds - self._batch_seconds)
        self._chunk_seconds += WEIGHT_OF_LATEST * (seconds / chunks - self._chunk_seconds)

    def forget(self, job: str) -> None:
        self._dry_at.pop(job, None)

    def order(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Most urgent first."""
        full = self._is_full(waiting)
        return sorted(waiting, key=lambda chunk: self._urgency(chunk, full))

    def is_first(self, chunk: Waiting) -> bool:
        """Whether its client waits for it in silence."""
        return chunk.stream and chunk.job not in self._dry_at

    def first_is_next(self, waiting: Sequence[Waiting], in_work: Sequence[Waiting]) -> bool:
        """Whether a first chunk is in work or the most urgent of what waits."""
        return any(map(self.is_first, [*in_work, *self.order(waiting)[:1]]))

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
            short = (short or any(map(self.is_first, batch))) and not self.is_first(chunk)
            return sum(frames) <= (SHORT_FRAMES if short else PACKED_FRAMES)
        padded = max(frames) * len(frames)
        return chunk.masked == batch[0].masked and padded <= PADDING_LIMIT * sum(frames)

    def _can_wait(self, chunk: Waiting) -> bool:
        now = self._clock()
        if not chunk.stream:
            return now < chunk.since + LONGEST_WAIT
        return not self.is_first(chunk) and now + ENOUGH_AUDIO < self._dry_at[chunk.job]

    def _is_full(self, waiting: Sequence[Waiting]) -> bool:
        """Whether a stream that has begun might run dry if another began now: those that wait for their next
        chunk get it one after the other, and each must have SPARE_BATCHES left then."""
        now = self._clock() + SPARE_BATCHES * self._batch_seconds
        begun = sorted(
            self._dry_at[chunk.job] for chunk in waiting if chunk.stream and not self.is_first(chunk)
        )
        return any(dry_at < now + place * self._chunk_seconds for place, dry_at in enumerate(begun, 1))

    def _urgency(self, chunk: Waiting, full: bool) -> tuple[int, float]:
        if self.is_first(chunk):
            return 1, chunk.since
        if chunk.stream:
            return 0 if full else 2, self._dry_at[chunk.job]
        due = chunk.since + PATIENCE
        return (0, due) if due < self._clock() else (2, chunk.since + LATER_PART * chunk.part)
