"""Schedules requests: a fixed number of clients (closed loop), or at given times independent of the responses
(open loop)."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from light_tts.tools.bench.client import Outcome

LAG_STEP = 0.01

# Sends request `index`, which was due at `due` on the clock of time.perf_counter.
Send = Callable[[int, float], Awaitable[Outcome]]


@dataclass
class LoadRun:
    """The result of a load: the counted requests, the seconds from the start of counting to the end of the
    last request, the delays of this process's event loop (seconds, every LAG_STEP), and whether the run was
    aborted."""

    outcomes: list[Outcome]
    wall: float
    lags: list[float]
    given_up: bool = False


@dataclass
class LoadProgress:
    """A progress line on stderr, updated at most five times per second."""

    number: int | None
    start: float = field(default_factory=time.perf_counter)
    shown: float = 0.0
    done: int = 0
    failed: int = 0

    def add(self, outcome: Outcome) -> None:
        self.done += 1
        self.failed += bool(outcome.error)
        if time.perf_counter() - self.shown > 0.2:
            self.show()

    def show(self, end: str = "") -> None:
        self.shown = time.perf_counter()
        total = "" if self.number is None else f"/{self.number}"
        line = f"\r{self.done}{total} done, {self.failed} failed, {self.shown - self.start:.0f} s"
        print(line, end=end, file=sys.stderr, flush=True)


async def _watch_lag(lags: list[float]) -> None:
    """Measure the delay of the event loop, which may also affect any timestamp. A cancelled step counts, too:
    requests that block the event loop may all be complete before the first step is."""
    while True:
        before = time.perf_counter()
        try:
            await asyncio.sleep(LAG_STEP)
        finally:
            lags.append(max(0.0, time.perf_counter() - before - LAG_STEP))


def arrivals(rate: float, seed: int, *, number: int | None = None, until: float | None = None) -> list[float]:
    """Return Poisson arrival times in seconds from now: exponential gaps with mean 1 / `rate`. Either
    `number` of them or all before `until`."""
    generator = np.random.default_rng(seed)
    if number is not None:
        return np.cumsum(generator.exponential(1 / rate, number)).tolist()
    assert until is not None
    times, now = [], generator.exponential(1 / rate)
    while now < until:
        times.append(float(now))
        now += generator.exponential(1 / rate)
    return times


async def closed_loop(
    send: Send, concurrency: int, *, number: int | None = None, duration: float | None = None
) -> LoadRun:
    """Run `concurrency` clients that each send the next request when the previous one is complete, until
    `number` requests are sent or `duration` seconds have passed."""
    run = LoadRun([], 0.0, [])
    progress = LoadProgress(number)
    indices = iter(range(number)) if number is not None else itertools.count()
    start = time.perf_counter()
    until = float("inf") if duration is None else start + duration

    async def one_client() -> None:
        for index in indices:
            due = time.perf_counter()
            if due >= until:
                return
            run.outcomes.append(await send(index, due))
            progress.add(run.outcomes[-1])

    watch = asyncio.create_task(_watch_lag(run.lags))
    try:
        await asyncio.gather(*(one_client() for _ in range(concurrency)))
    finally:
        watch.cancel()
        progress.show("\n")
    run.wall = time.perf_counter() - start
    return run


async def open_loop(
    send: Send,
    times: Sequence[float],
    *,
    lead_in: float = 0.0,
    hopeless: Callable[[list[Outcome]], bool] | None = None,
) -> LoadRun:
    """Send requests at `times` (seconds from now), regardless of how many are active. Those before `lead_in`
    fill the server and are not counted. As soon as `hopeless` returns True for the counted ones that are
    complete, the run is aborted and the remaining connections are closed."""
    run = LoadRun([], 0.0, [])
    progress = LoadProgress(len(times))
    start = time.perf_counter()

    async def one_request(index: int, due: float) -> Outcome:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await send(index, due)

    watch = asyncio.create_task(_watch_lag(run.lags))
    tasks = [asyncio.create_task(one_request(index, start + at)) for index, at in enumerate(times)]
    try:
        for task in asyncio.as_completed(tasks):
            outcome = await task
            progress.add(outcome)
            if outcome.due - start < lead_in:
                continue
            run.outcomes.append(outcome)
            if hopeless and hopeless(run.outcomes):
                run.given_up = True
                break
    finally:
        for unfinished in (watch, *tasks):
            unfinished.cancel()
        await asyncio.gather(watch, *tasks, return_exceptions=True)
        progress.show("\n")
    run.wall = max(0.0, time.perf_counter() - start - lead_in)
    return run
