"""The decode policy under overload, with random batch durations and a simulated clock: started streams never
run out of audio because of others, and no time is wasted."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from light_tts.engine.speech.policy import DeadlinePolicy, Waiting

RATE = 24_000
FIRST_CHUNK, CHUNK = 0.84, 1.0  # seconds of audio
SECONDS = 60.0  # of arrivals


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stream:
    arrived: float
    chunks: int
    spoken: int = 0
    dry_at: float = 0.0
    ran_dry: bool = False
    started: float = 0.0
    ended: float = 0.0
    waits_since: float = field(init=False)

    def __post_init__(self) -> None:
        self.waits_since = self.arrived

    def hear(self, now: float) -> None:
        self.ran_dry |= self.spoken > 0 and now > self.dry_at
        self.started = self.started or now
        self.dry_at = max(self.dry_at, now) + (CHUNK if self.spoken else FIRST_CHUNK)
        self.spoken += 1
        self.waits_since = self.ended = now


def serve(streams: list[Stream], seconds_of: Callable[[int], float], limit: int) -> float:
    """Speak all streams, `limit` chunks per batch of `seconds_of(chunks)`; return the idle seconds."""
    clock = Clock()
    policy = DeadlinePolicy(RATE, clock, packed=limit > 1)
    arrivals = [(stream.arrived, number) for number, stream in enumerate(streams)]
    heapq.heapify(arrivals)
    present: set[int] = set()
    idle = 0.0
    while arrivals or present:
        if not present:
            idle += arrivals[0][0] - clock.now
            clock.now = arrivals[0][0]
        while arrivals and arrivals[0][0] <= clock.now:
            present.add(heapq.heappop(arrivals)[1])
        waiting = [
            Waiting(number, streams[number].waits_since, True, True, 100) for number in sorted(present)
        ]
        batch = policy.next_batch(waiting, limit)
        seconds = seconds_of(len(batch))
        clock.now += seconds
        policy.took(seconds, len(batch))
        for chunk in batch:
            stream = streams[chunk.job]
            policy.delivered(chunk.job, int(RATE * (CHUNK if stream.spoken else FIRST_CHUNK)))
            stream.hear(clock.now)
            if stream.spoken == stream.chunks:
                policy.forget(chunk.job)
                present.remove(chunk.job)
    return idle


def poisson(streams_a_second: float, lengths: list[int]) -> list[Stream]:
    rng, now, streams = random.Random(2), 0.0, []
    while (now := now + rng.expovariate(streams_a_second)) < SECONDS:
        streams.append(Stream(now, lengths[len(streams) % len(lengths)]))
    return streams


def cpu(seed: int) -> Callable[[int], float]:
    """A chunk takes 0.1 s, plus or minus half of it."""
    rng = np.random.default_rng(seed)
    return lambda chunks: float(rng.lognormal(np.log(0.1) - 0.11, 0.47))


def gpu(chunks: int) -> float:
    return 0.01 + 0.004 * chunks


@pytest.mark.parametrize("load", [0.8, 1.3, 3.0])
def test_on_a_cpu_streams_that_have_begun_hardly_ever_run_dry(load):
    streams = poisson(load * 10 / 3, [3])
    idle = serve(streams, cpu(5), 1)
    assert sum(stream.ran_dry for stream in streams) <= 0.02 * len(streams)
    if load > 1:
        assert idle < 2
        begun = [stream.arrived for stream in sorted(streams, key=lambda stream: stream.ended)]
        assert np.abs(np.argsort(begun) - np.arange(len(begun))).max() < 12  # no stream is overtaken by many


def test_below_half_of_the_load_streams_start_soon():
    """Where ten batches were always kept, the 95th percentile was 0.49 s instead of 0.40 s."""
    streams = poisson(0.4 * 10 / 3, [3])
    serve(streams, cpu(5), 1)
    assert np.percentile([stream.started - stream.arrived for stream in streams], 95) < 0.44
    assert not any(stream.ran_dry for stream in streams)


@pytest.mark.parametrize("load", [0.8, 1.3])
def test_on_a_gpu_no_stream_that_has_begun_runs_dry(load):
    streams = poisson(load * 32 / gpu(32) / 8.7, [3, 3, 20])
    idle = serve(streams, gpu, 32)
    assert not any(stream.ran_dry for stream in streams)
    assert load < 1 or idle < 2
