"""Chooses the next work: first chunks first, then the stream whose client runs out of audio soonest. But no
new stream starts while that might make a started one run out: under overload, started streams are finished
before others start.

Pure: no tensors or messages, and no time except the clock it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

PADDING_LIMIT = 1.5  # a padded batch may cost this many times the work of its items alone
# Mel frames of a packed batch. A larger one would hardly be more efficient, and new work would wait for all
# of it. A batch with a first chunk, whose client has no audio yet, is filled with other chunks up to
# SHORT_FRAMES only, and a batch of the urgent lane, for which the next first chunk must wait, has no more
# either. But small batches use the GPU badly: if much waits, they take a quarter or half of that, up to
# MOST_SHORT_FRAMES.
PACKED_FRAMES = 8192
SHORT_FRAMES = 256
MOST_SHORT_FRAMES = 2048
# What may wait until first chunks in progress are finished: a stream whose client has more audio than this
# (seconds), and a complete response until it has waited this long.
ENOUGH_AUDIO = 0.5
LONGEST_WAIT = 0.25
# Such chunks also wait, this long at most (seconds), while the language model generates the tokens of a first
# chunk on the same GPU: otherwise both take nearly twice as long. But once this many frames wait, they fill
# the GPU well and start at once.
GATHERING = 0.1
GATHERED_FRAMES = 1024
# First chunks wait this long at most (seconds) while the tokens of more first chunks than are waiting are
# being generated: together they take much less time than one after the other.
FIRSTS_GATHERING = 0.02
# A complete response that has waited this long (seconds) becomes as urgent as a stream that has run out.
PATIENCE = 5.0
# A complete response is spoken part by part. Each part may wait this much longer (seconds) than the one
# before it, so that a short response passes a long one.
LATER_PART = 1.0
# A started stream must get its next chunk with this many batches to spare before another stream starts: batch
# durations vary, and each new stream takes its share of the time until it ends. Fewer suffice while the
# streams, including the new one, need at most the fraction BUSY of the time: one that is late catches up.
SPARE_BATCHES, SPARE_WHEN_NOT_BUSY = 10, 2
BUSY = 0.5
WEIGHT_OF_LATEST = 0.2  # in the moving average of batch durations


@dataclass(frozen=True)
class Waiting:
    """A chunk that can be spoken. `since`: when it became ready; `stream`: whether the client hears it at
    once; `masked`: attention mode of the flow, the same for a whole batch; `frames`: mel frames that the flow
    computes for it; `tokens`: its length, with the prompt; `part`: the number of its part."""

    job: str
    since: float
    stream: bool
    masked: bool
    frames: int
    tokens: int = 0
    part: int = 0


class DeadlinePolicy:
    """Tracks for each started stream until when its client has audio (its deadline); a complete response is
    due since it became ready. `packed`: batches are not padded, so any chunks can share one. `firsts_alone`:
    concurrent batches slow each other down, so first chunks should run alone."""

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
        # moving averages: duration of a batch, the same per chunk, and audio of a chunk
        self._batch_seconds = 0.0
        self._chunk_seconds = 0.0
        self._chunk_audio = 0.0

    def resumed(self, job: str) -> None:
        """A new job continues one whose client has already received the beginning and may have run out of
        audio."""
        self._dry_at[job] = self._clock()

    def delivered(self, job: str, samples: int) -> None:
        """Audio was sent to the client; one that had run out plays it from now on."""
        now, audio = self._clock(), samples / self._sample_rate
        self._dry_at[job] = max(self._dry_at.get(job, now), now) + audio
        self._chunk_audio += (WEIGHT_OF_LATEST if self._chunk_audio else 1.0) * (audio - self._chunk_audio)

    def took(self, seconds: float, chunks: int) -> None:
        """Record that a batch of `chunks` chunks took `seconds`."""
        self._batch_seconds += WEIGHT_OF_LATEST * (seconds - self._batch_seconds)
        self._chunk_seconds += WEIGHT_OF_LATEST * (seconds / chunks - self._chunk_seconds)

    def forget(self, job: str) -> None:
        self._dry_at.pop(job, None)

    def order(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Return the waiting chunks, most urgent first."""
        full = self._is_full(waiting)
        return sorted(waiting, key=lambda chunk: self._urgency(chunk, full))

    def is_new(self, job: str) -> bool:
        """Return whether the client of a stream has no audio yet."""
        return job not in self._dry_at

    def is_first(self, chunk: Waiting) -> bool:
        return chunk.stream and self.is_new(chunk.job)

    def first_is_next(self, waiting: Sequence[Waiting], in_work: Sequence[Waiting]) -> bool:
        """Return whether a first chunk is in progress or is the most urgent waiting one."""
        return any(map(self.is_first, [*in_work, *self.order(waiting)[:1]]))

    def gathers(self, waiting: Sequence[Waiting], coming: int) -> bool:
        """Return whether all of `waiting` should wait while the tokens of `coming` first chunks are
        generated."""
        now = self._clock()
        firsts = [chunk for chunk in waiting if self.is_first(chunk)]
        others = [chunk for chunk in waiting if not self.is_first(chunk)]
        if not (self._firsts_alone and coming > len(firsts) and all(map(self._can_wait, others))):
            return False
        if firsts:
            return now < min(chunk.since for chunk in firsts) + FIRSTS_GATHERING
        return (
            sum(chunk.frames for chunk in others) < GATHERED_FRAMES
            and now < min(chunk.since for chunk in others) + GATHERING
        )

    def next_batch(
        self,
        waiting: Sequence[Waiting],
        limit: int,
        short: bool = False,
        in_work: Sequence[Waiting] = (),
    ) -> list[Waiting]:
        """Return the most urgent chunk and up to `limit - 1` more that can share its batch, in order of
        urgency; empty if nothing waits, or if all of it can wait for the first chunks `in_work`. `short`:
        limit packed batches to a length that first chunks can wait for (the urgent lane)."""
        beside_first = self._firsts_alone and any(map(self.is_first, in_work))
        if beside_first and all(map(self._can_wait, waiting)):
            return []
        batch: list[Waiting] = []
        everything = sum(chunk.frames for chunk in waiting)
        room = _short(everything // 2) if short else PACKED_FRAMES
        beside_firsts = _short(everything // 4)
        for chunk in self.order(waiting):
            if len(batch) < limit and (not batch or self._may_join(chunk, batch, room, beside_firsts)):
                batch.append(chunk)
        return batch

    def _may_join(self, chunk: Waiting, batch: list[Waiting], room: int, beside_firsts: int) -> bool:
        frames = [other.frames for other in batch] + [chunk.frames]
        if self._packed:
            if self.is_first(chunk):
                room = PACKED_FRAMES
            elif any(map(self.is_first, batch)):
                room = beside_firsts
            return sum(frames) <= room
        padded = max(frames) * len(frames)
        return chunk.masked == batch[0].masked and padded <= PADDING_LIMIT * sum(frames)

    def _can_wait(self, chunk: Waiting) -> bool:
        now = self._clock()
        if not chunk.stream:
            return now < chunk.since + LONGEST_WAIT
        return not self.is_first(chunk) and now + ENOUGH_AUDIO < self._dry_at[chunk.job]

    def _is_full(self, waiting: Sequence[Waiting]) -> bool:
        """Return whether a started stream might run out if another one started now: the streams waiting for
        their next chunk get it one after the other, and each must then have enough batches left."""
        streams = len(self._dry_at) + 1
        busy = streams * self._chunk_seconds > BUSY * self._chunk_audio
        now = self._clock() + (SPARE_BATCHES if busy else SPARE_WHEN_NOT_BUSY) * self._batch_seconds
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


def _short(frames: int) -> int:
    """Return `frames` within the limits of a short batch."""
    return min(MOST_SHORT_FRAMES, max(SHORT_FRAMES, frames))
