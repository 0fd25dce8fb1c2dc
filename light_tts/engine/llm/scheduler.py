"""Which requests run, and what the next step does. Plain data: no tensors, no messages, no clock.

Requests are admitted by tokens: when the peak of KV slots that all of them together can be expected to need
fits the pool. Where the expectation was too low the youngest is paused: it loses its slots and later goes on
by a new prefill.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from light_tts.engine.llm.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """`slots`: KV pool; `prefill_tokens`: one prefill step; `running`: requests with KV slots; `alive`:
    running and paused; `steps_between_admissions`: decode steps; `busy_ratio`: share of the pool in use from
    which each request is counted with its longest possible output, below it with `assumed_output`;
    `round_steps`: most decode steps that are begun at once."""

    slots: int
    prefill_tokens: int
    running: int
    alive: int
    steps_between_admissions: int
    busy_ratio: float
    assumed_output: int
    round_steps: int = 1


@dataclass
class Plan:
    """`work`: either a prefill, (sequence, how many of its pending ids go into the model), or a round of
    decode steps, (sequence, how many steps it takes part in); empty: only steps under way can bring a request
    on; `evicted`: sequences whose slots must be given back first."""

    work: list[tuple[Sequence, int]] = field(default_factory=list)
    evicted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Sequences of one job run one after another, in the order of their parts; jobs in the order of their
    arrival."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.paused: list[Sequence] = []
        self._later_parts: dict[str, deque[Sequence]] = {}  # of each job that has a part in a list above
        self._arrivals = 0
        self._evicted: list[Sequence] = []
        self._steps = 0  # since the last admission
        self._prefilled = False  # what was begun last is a prefill

    @property
    def used_slots(self) -> int:
        return sum(sequence.cached for sequence in self.running)

    @property
    def queued(self) -> int:
        """Sequences not yet admitted, later parts included."""
        return len(self.waiting) + sum(map(len, self._later_parts.values()))

    @property
    def present(self) -> list[Sequence]:
        """All sequences but later parts."""
        return self.running + self.paused + self.waiting

    @property
    def has_work(self) -> bool:
        """Whether a step is possible now."""
        return any(s.ready for s in self.running) or any(map(_wants_in, self.waiting + self.paused))

    def submit(self, sequence: Sequence) -> None:
        earlier = next(self._of_job(sequence.job), None)
        if earlier is not None:
            sequence.arrival = earlier.arrival
            self._later_parts[sequence.job].append(sequence)
        else:
            self._arrivals += 1
            sequence.arrival = self._arrivals
            self._later_parts[sequence.job] = deque()
            self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Move what fits from waiting and paused to running, oldest first, and return it."""
        if self._steps < self._limits.steps_between_admissions and any(s.ready for s in self.running):
            return []
        self._steps = 0
        admitted: list[Sequence] = []
        tokens = 0
        for candidate in sorted(self.paused + self.waiting, key=lambda s: s.arrival):
            new = candidate in self.waiting
            if not _wants_in(candidate) or (new and self._alive() >= self._limits.alive):
                continue
            tokens += candidate.pending
            if (admitted and tokens > self._limits.prefill_tokens) or not self._make_room_for(candidate):
                break
            (self.waiting if new else self.paused).remove(candidate)
            self.running.append(candidate)
            admitted.append(candidate)
        return admitted

    def plan(self, most_steps: int | None = None, among: Container[str] | None = None) -> Plan:
        """What to begin next, for the jobs `among` where given: prefill of those that have ids the device
        does not know, as many as fit, the last one in part; else, and after each prefill, decode steps of all
        others, `most_steps` at most."""
        round_steps = self._limits.round_steps
        if most_steps is not None:
            round_steps = min(round_steps, most_steps)
        work: list[tuple[Sequence, int]] = []
        while runnable := sorted(
            (s for s in self.running if s.runnable and (among is None or s.job in among)),
            key=lambda s: s.arrival,
        ):
            prefill = [s for s in runnable if not s.on_device]
            decode = [s for s in runnable if s.on_device]
            prefills = bool(prefill) and not (decode and self._prefilled)
            work = self._prefill(prefill) if prefills else self._decode(decode, round_steps)
            if self._must_wait_for_slots(work):
                work = []
                break
            self._find_slots(work)
            self._prefilled = prefills
            if work:
                self._steps += 0 if prefills else max(steps for _, steps in work)
                break
        plan = Plan(work, self._evicted)
        self._evicted = []
        return plan

    def end(self, sequence: Sequence) -> None:
        """The sequence is over; the job's next part comes in its place."""
        self._remove(sequence)
        later = self._later_parts[sequence.job]
        if later:
            self.waiting.append(later.popleft())
        else:
            del self._later_parts[sequence.job]

    def abort(self, job: str) -> list[Sequence]:
        """Forget all sequences of a job and return them."""
        sequences = list(self._of_job(job)) + list(self._later_parts.pop(job, ()))
        for sequence in sequences:
            self._remove(sequence)
        return sequences

    def _of_job(self, job: str) -> Iterator[Sequence]:
        return (s for s in self.present if s.job == job)

    def _remove(self, sequence: Sequence) -> None:
        for sequences in (self.running, self.paused, self.waiting):
            if sequence in sequences:
                sequences.remove(sequence)

    def _prefill(self, sequences: list[Sequence]) -> list[tuple[Sequence, int]]:
        work, room = [], self._limits.prefill_tokens
        for sequence in sequences:
            if room == 0:
                break
            tokens = min(sequence.pending, room)
            work.append((sequence, tokens))
            room -= tokens
        return work

    def _decode(self, sequences: list[Sequence], round_steps: int) -> list[tuple[Sequence, int]]:
        """A round up to the next admission; a shorter one where slots are short."""
        most = max(1, self._limits.steps_between_admissions - self._steps)
        room = max(1, (self._limits.slots - self.used_slots) // len(sequences))
        most = min(most, room, round_steps)
        return [(sequence, min(most, sequence.free_steps)) for sequence in sequences]

    def _must_wait_for_slots(self, work: list[tuple[Sequence, int]]) -> bool:
        """Whether the slots are too few while steps are under way, after which there may be more: a request
        that turns out to have ended gives back its own."""
        return self._lacks_slots(work) and any(s.ahead for s in self.running)

    def _lacks_slots(self, work: list[tuple[Sequence, int]]) -> bool:
        return self.used_slots + sum(tokens for _, tokens in work) > self._limits.slots

    def _find_slots(self, work: list[tuple[Sequence, int]]) -> None:
        """Pause until the work's tokens have slots: idle requests first, then the youngest."""
        while self._lacks_slots(work):
            victim = max(self.running, key=lambda s: (not s.ready, s.arrival))
            work[:] = [(sequence, tokens) for sequence, tokens in work if sequence is not victim]
            self._pause(victim)

    def _pause(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.paused.append(sequence)
        self._evicted.append(sequence)

    def _make_room_for(self, candidate: Sequence) -> bool:
        """Whether the candidate fits; running requests that wait for text give way to it."""
        if not self._fit([*(s for s in self.running if s.ready), candidate]):
            return False
        while not self._fit([*self.running, candidate]):
            self._pause(max((s for s in self.running if not s.ready), key=lambda s: s.arrival))
        return True

    def _alive(self) -> int:
        """Requests under way that do not wait for text."""
        return sum(s.ready for s in self.running + self.paused)

    def _fit(self, sequences: list[Sequence]) -> bool:
        return len(sequences) <= self._limits.running and self.peak(sequences) <= self._limits.slots

    def peak(self, sequences: list[Sequence]) -> int:
        """Most slots that the sequences are expected to hold at a time: sorted by what each has yet to
        produce, the one that ends as the i-th last ends when all before it have grown by as much as it."""
        busy = self.used_slots >= self._limits.busy_ratio * self._limits.slots
        by_rest = sorted(((self._rest(s, busy), len(s.inputs)) for s in sequences), reverse=True)
        peak = held = 0
        for i, (rest, tokens) in enumerate(by_rest):
            held += tokens
            peak = max(peak, held + rest * (i + 1))
        return peak

    def _rest(self, sequence: Sequence, busy: bool) -> int:
        """Tokens the sequence is expected to produce yet."""
        if busy and sequence.max_outputs is not None:
            return sequence.longest_rest
        produced = len(sequence.outputs)
        expected = max(int(1.1 * produced), self._limits.assumed_output) - produced
        return max(0, min(sequence.longest_rest, expected))


def _wants_in(sequence: Sequence) -> bool:
    """A sequence whose forced tokens were all there was to it is finished before it has run."""
    return sequence.ready or sequence.finished
