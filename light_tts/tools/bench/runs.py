"""The runs of a benchmark: a single one, one per number of clients, or a search for the highest rate."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import aiohttp

from light_tts.tools.bench import figures
from light_tts.tools.bench.client import Outcome, speak
from light_tts.tools.bench.load import LoadRun, arrivals, closed_loop, open_loop
from light_tts.tools.bench.search import Goal, find_highest
from light_tts.tools.bench.workload import Workload

WARMUP_CLIENTS = 8
REQUESTS_PER_CLIENT = 3  # minimum in a sweep
FEWEST = 5  # minimum requests of a probe; rates with fewer in --duration cannot be evaluated


class Benchmark:
    """Makes the runs given by the command line and prints them. `points`: load and figures of each run;
    `highest_rate`: result of `find_rate` in requests per second."""

    def __init__(self, args: argparse.Namespace, workload: Workload, session: aiohttp.ClientSession) -> None:
        self.args, self.workload, self.session = args, workload, session
        self.points: list[dict[str, Any]] = []
        self.highest_rate = 0.0

    async def warm_up(self) -> None:
        """Send requests that are not counted, to fill the server's caches."""
        await closed_loop(self._send, WARMUP_CLIENTS, number=self.args.warmup)

    async def single(self) -> None:
        """Make one run and print it as a table."""
        args = self.args
        point = await (self._open(args.rate) if args.rate else self._closed(args.concurrency, args.number))
        print(figures.table(point))

    async def sweep(self) -> None:
        """Make a run per number of clients and print one line each."""
        print(figures.heading())
        for concurrency in self.args.sweep:
            number = None
            if not self.args.duration:
                number = max(self.args.number, REQUESTS_PER_CLIENT * concurrency)
            print(figures.line(await self._closed(concurrency, number)), flush=True)

    async def find_rate(self) -> None:
        """Search for the highest rate that meets the goal and print one line per tested rate."""
        goal = Goal(self.args.slo_first_audio)

        async def probe(rate: float) -> bool:
            point = await self._open(rate, goal)
            shortfall = goal.shortfall(point)
            print(f"{figures.line(point)}  {shortfall or 'ok'}", flush=True)
            return not shortfall

        print(figures.heading())
        first, lowest = self.args.rate or 1.0, FEWEST / self.args.duration
        self.highest_rate = await find_highest(probe, first, self.args.precision, lowest)
        print(f"highest rate: {self.highest_rate:.2f} requests/s")

    async def _send(self, index: int, due: float) -> Outcome:
        return await speak(self.session, self.workload.body(index), index, due)

    async def _closed(self, concurrency: int, number: int | None) -> dict[str, Any]:
        run = await closed_loop(self._send, concurrency, number=number, duration=self.args.duration)
        return self._add_point(run, "closed", concurrency, None)

    async def _open(self, rate: float, goal: Goal | None = None) -> dict[str, Any]:
        """Make one run at `rate`; with a goal, abort it as soon as the goal cannot be met."""
        args = self.args
        if args.duration:
            times = arrivals(rate, args.arrival_seed, until=args.lead_in + args.duration)
        else:
            times = arrivals(rate, args.arrival_seed, number=args.number)
        counted = sum(time >= args.lead_in for time in times)
        hopeless = partial(goal.is_hopeless, planned=counted) if goal else None
        run = await open_loop(self._send, times, lead_in=args.lead_in, hopeless=hopeless)
        return self._add_point(run, "open", None, rate)

    def _add_point(
        self, run: LoadRun, mode: str, concurrency: int | None, rate: float | None
    ) -> dict[str, Any]:
        load = {"mode": mode, "concurrency": concurrency, "rate": rate, "stream": self.args.stream}
        point = load | figures.summarize(run)
        if self.args.csv:
            figures.append_csv(self.args.csv, point)
        if self.args.records:
            point["records"] = figures.records(run)
        self.points.append(point)
        return point
