"""Decides which requests run and what the next step does. Plain data: no tensors, messages or clock.

Requests are admitted by tokens: if the expected peak of KV slots needed by all of them fits in the pool. If
the estimate was too low, the youngest request is paused: it loses its slots and resumes later with a new
prefill.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from light_tts.engine.llm.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """`slots`: size of the KV pool; `prefill_tokens`, `prefill_requests`: of one prefill step; `running`:
    requests with KV slots; `alive`: running and paused requests; `steps_between_admissions`: decode steps;
    `busy_ratio`: pool utilization above which each request counts with its maximum output length, below it
    with `assumed_output`; `round_steps`: maximum number of decode steps per launch."""

    slots: int
    prefill_tokens: int
    prefill_requests: int
    running: int
    alive: int
    steps_between_admissions: int
    busy_ratio: float
    assumed_output: int
    round_steps: int = 1


@dataclass
class Plan:
    """`work`: either a prefill, (sequence, number of pending ids to feed), or a round of decode steps,
    (sequence, number of steps it takes part in). Empty if only steps in progress can advance a request.
    `evicted`: sequences whose slots must be freed first."""

    work: list[tuple[Sequence, int]] = field(default_factory=list)
    evicted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Runs the sequences of one job one after another in the order of its parts, and jobs in order of
    arrival."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.paused: list[Sequence] = []
        # of each job that has a part in one of the lists above
        self._later_parts: dict[str, deque[Sequence]] = {}
        self._arrivals = 0
        self._evicted: list[Sequence] = []
        self._steps = 0  # since the last admission
        self._prefilled = False  # whether the last launch was a prefill

    @property
    def used_slots(self) -> int:
        return sum(sequence.cached for sequence in self.running)

    @property
    def queued(self) -> int:
        """Number of sequences not admitted yet, including later parts."""
        return len(self.waiting) + sum(map(len, self._later_parts.values()))

    @property
    def present(self) -> list[Sequence]:
        """All sequences except later parts."""
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
            full = tokens > self._limits.prefill_tokens or len(admitted) == self._limits.prefill_requests
            if (admitted and full) or not self._make_room_for(candidate):
                break
            (self.waiting if new else self.paused).remove(candidate)
            self.running.append(candidate)
            admitted.append(candidate)
        return admitted

    def plan(self, most_steps: int | None = None, among: Container[str] | None = None) -> Plan:
        """Return what to launch next, limited to the jobs `among` if given. Sequences with ids that the
        device does not know are prefilled, as many as fit, the last one partially. Otherwise, and after each
        prefill, all others take decode steps, at most `most_steps`."""
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
        """Remove a finished sequence; the job's next part takes its place."""
        self._remove(sequence)
        later = self._later_parts[sequence.job]
        if later:
            self.waiting.append(later.popleft())
        else:
            del self._later_parts[sequence.job]

    def abort(self, job: str) -> list[Sequence]:
        """Remove and return all sequences of a job."""
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
        for sequence in sequences[: self._limits.prefill_requests]:
            if room == 0:
                break
            tokens = min(sequence.pending, room)
            work.append((sequence, tokens))
            room -= tokens
        return work

    def _decode(self, sequences: list[Sequence], round_steps: int) -> list[tuple[Sequence, int]]:
        """Return a round up to the next admission, or a shorter one if slots are scarce."""
        most = max(1, self._limits.steps_between_admissions - self._steps)
        room = max(1, (self._limits.slots - self.used_slots) // len(sequences))
        most = min(most, room, round_steps)
        return [(sequence, min(most, sequence.free_steps)) for sequence in sequences]

    def _must_wait_for_slots(self, work: list[tuple[Sequence, int]]) -> bool:
        """Return whether there are too few slots while steps are in progress, which may free some: a request
        that turns out to have ended frees its own."""
        return self._lacks_slots(work) and any(s.ahead for s in self.running)

    def _lacks_slots(self, work: list[tuple[Sequence, int]]) -> bool:
        return self.used_slots + sum(tokens for _, tokens in work) > self._limits.slots

    def _find_slots(self, work: list[tuple[Sequence, int]]) -> None:
        """Pause requests until the work's tokens have slots: idle requests first, then the youngest."""
        while self._lacks_slots(work):
            victim = max(self.running, key=lambda s: (not s.ready, s.arrival))
            work[:] = [(sequence, tokens) for sequence, tokens in work if sequence is not victim]
            self._pause(victim)

    def _pause(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.paused.append(sequence)
        self._evicted.append(sequence)

    def _make_room_for(self, candidate: Sequence) -> bool:
        """Pause running requests that wait for text to make room; return whether the candidate fits."""
        if not self._fit([*(s for s in self.running if s.ready), candidate]):
            return False
        while not self._fit([*self.running, candidate]):
            self._pause(max((s for s in self.running if not s.ready), key=lambda s: s.arrival))
        return True

    def _alive(self) -> int:
        """Number of active requests that do not wait for text."""
        return sum(s.ready for s in self.running + self.paused)

    def _fit(self, sequences: list[Sequence]) -> bool:
        return len(sequences) <= self._limits.running and self.peak(sequences) <= self._limits.slots

    def peak(self, sequences: list[Sequence]) -> int:
        """Return the maximum number of slots that the sequences are expected to hold at once. Sorted by
        remaining output, when a sequence ends, all those with more to produce have grown by as much as it
        has."""
        busy = self.used_slots >= self._limits.busy_ratio * self._limits.slots
        by_rest = sorted(((self._rest(s, busy), len(s.inputs)) for s in sequences), reverse=True)
        peak = held = 0
        for i, (rest, tokens) in enumerate(by_rest):
            held += tokens
            peak = max(peak, held + rest * (i + 1))
        return peak

    def _rest(self, sequence: Sequence, busy: bool) -> int:
        """Return the number of tokens the sequence is expected to produce still."""
        if busy and sequence.max_outputs is not None:
            return sequence.longest_rest
        produced = len(sequence.outputs)
        expected = max(int(1.1 * produced), self._limits.assumed_output) - produced
        return max(0, min(sequence.longest_rest, expected))


def _wants_in(sequence: Sequence) -> bool:
    """Return whether the sequence needs a step; one that consisted only of forced tokens is finished before
    it has run."""
    return sequence.ready or sequence.finished
