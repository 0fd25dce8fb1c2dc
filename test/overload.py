"""Overload of a server of this machine that is started for it, with the small checkpoint of the tests.

    python test/overload.py                        10 times its capacity for 60 s
    python test/overload.py --times 5 --seconds 20

First closed loops: the best of them is the capacity, in seconds of audio made a second. Then an open loop at
the rate that is the capacity, the same at so many times that rate, and one short request after the other
until they are answered as before. Streams of 3 s of audio; a load takes `--seconds`, a closed loop a quarter.
Where other programs use the cores as well, goodput is better told by audio for each CPU second of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import partial

import aiohttp
import psutil
from support.server_process import Server, launch

from light_tts.tools.bench import figures
from light_tts.tools.bench.client import Outcome, open_session, speak
from light_tts.tools.bench.load import LoadRun, arrivals, closed_loop, open_loop
from light_tts.tools.bench.workload import TEXTS, Workload

CLIENTS = (4, 8, 16)
TOKENS = 75
LATER = 100_000  # index of the first request of the second open loop: seeds of its own


def ended_well(run: LoadRun) -> list[Outcome]:
    return [outcome for outcome in run.outcomes if not outcome.error]


def latency(run: LoadRun, name: str = "p95") -> float:
    return figures.spread([outcome.latency for outcome in ended_well(run)]).get(name, float("inf"))


def cpu_seconds(server: Server) -> float:
    """CPU time of all its processes so far."""
    times = [child.cpu_times() for child in psutil.Process(server.pid).children(recursive=True)]
    return sum(time.user + time.system for time in times)


@dataclass
class Load:
    """Result of a load. `rate`: seconds of audio of complete responses per second; `efficiency`: the same per
    CPU second of the server."""

    run: LoadRun
    rate: float
    efficiency: float


async def measured(server: Server, name: str, load: Awaitable[LoadRun]) -> Load:
    """Run the load and print the result."""
    before = cpu_seconds(server)
    run = await load
    used = cpu_seconds(server) - before
    audio = sum(outcome.audio for outcome in ended_well(run))
    refused = [outcome.latency for outcome in run.outcomes if outcome.error == "HTTP 429"]
    accepted = [outcome for outcome in run.outcomes if outcome.error != "HTTP 429"]
    first_audio = [outcome.first_audio for outcome in ended_well(run)]
    figures_of_it = {
        "requests": len(run.outcomes),
        "accepted": len(accepted),
        "cut off or failed": sum(bool(outcome.error) for outcome in accepted),
        "audio s/s": round(audio / run.wall, 2),
        "audio s/CPU s": round(audio / used, 2),
        "CPUs": round(used / run.wall, 2),
        "latency P50, P95": f"{latency(run, 'p50'):.2f}, {latency(run):.2f} s",
        "first audio P95": f"{figures.spread(first_audio).get('p95', 0):.2f} s",
        "run dry": sum(outcome.playback.underruns > 0 for outcome in ended_well(run)),
        "refusal P50, P95": ", ".join(
            f"{figures.spread(refused).get(name, 0) * 1000:.0f}" for name in ("p50", "p95")
        )
        + " ms",
        "client's lag P95": f"{figures.spread(run.lags).get('p95', 0) * 1000:.0f} ms",
    }
    print(name, figures_of_it, flush=True)
    return Load(run, audio / run.wall, audio / used)


async def seconds_to_normal(session: aiohttp.ClientSession, workload: Workload, normal: float) -> float:
    """Return the seconds until a request is answered within `normal` seconds, at most 30."""
    begun = time.perf_counter()
    for index in range(1000):
        outcome = await speak(session, workload.body(index), index, time.perf_counter())
        sent = outcome.start - begun
        if sent > 30 or (not outcome.error and outcome.latency <= normal):
            return sent
        await asyncio.sleep(0.1)
    return float("inf")


async def measure(server: Server, times: float, seconds: float) -> None:
    fields = {"stream": True, "spk_id": "tiny_spk", "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    workload = Workload(TEXTS, fields, None, 0, as_json=True)
    async with open_session(server.url, 60.0) as session:

        async def send(index: int, due: float, first: int = 0) -> Outcome:
            return await speak(session, workload.body(first + index), index, due)

        await closed_loop(send, 2, number=6)
        alone = await measured(server, "alone", closed_loop(send, 1, duration=seconds / 8))
        closed = [
            await measured(server, f"{clients} clients", closed_loop(send, clients, duration=seconds / 4))
            for clients in CLIENTS
        ]
        best = max(closed, key=lambda load: load.rate)
        rate = best.rate / (TOKENS / 25)
        at_capacity = await measured(
            server, f"open loop, {rate:.2f} a second", open_loop(send, arrivals(rate, 0, until=seconds))
        )
        much = open_loop(partial(send, first=LATER), arrivals(times * rate, 1, until=seconds))
        load = asyncio.create_task(measured(server, f"open loop, {times * rate:.2f} a second", much))
        await asyncio.sleep(seconds)
        normal = 2 * latency(alone.run, "max")
        back = await seconds_to_normal(session, workload, normal)
        overload = await load
        print(
            f"goodput: {overload.rate / best.rate:.0%} of the closed loops' maximum, "
            f"{overload.efficiency / best.efficiency:.0%} for each CPU second"
        )
        p95 = latency(overload.run)
        print(
            f"P95 of accepted requests: {p95 / latency(at_capacity.run):.2f} times that of the open loop at "
            f"capacity, {p95 / latency(best.run):.2f} times that of the best closed loop"
        )
        print(f"back to normal (within {normal:.2f} s) {back:.1f} s after the load")
        for reason in ("wait", "deadline", "pending"):
            print(f"refused, {reason}: {server.metric('light_tts_refused_total', reason=reason):.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=float, default=10.0, help="of the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a load")
    args = parser.parse_args()
    with launch() as server:
        asyncio.run(measure(server, args.times, args.seconds))


if __name__ == "__main__":
    main()
