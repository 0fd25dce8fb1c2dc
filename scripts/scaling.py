"""Capacity and requirements of 10, 100 and 1,000 GPUs: simulates random requests over many servers and
derives the other figures. Prints the tables of docs/scaling.md.

    python scripts/scaling.py
    python scripts/scaling.py --gpu_hour 2.5 --busy 0.6

Each server performs like the H100 measured in docs/performance.md (short5s, streaming: requests of 5 s of
audio).
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import math
import random
from dataclasses import dataclass, field

# For these numbers of active requests: requests served per second, seconds to first audio (P95).
IN_WORK = (1, 8, 16, 32, 64)
RATE = (7.6, 22.8, 33.5, 44.6, 48.5)
FIRST_AUDIO = (0.056, 0.140, 0.206, 0.325, 0.482)

AUDIO = 5.0  # seconds per request
CHARACTERS = 15.0  # spoken per second
PCM = 48_000.0  # bytes per second of audio: 24 kHz, 16 bits
OPUS = 4_000.0  # 32 kbit/s
MEASURED = 42.5  # requests per second at random times that one server sustains within the goal
GOAL = 0.4  # seconds to the first audio, P95
SIMULATED = 100  # maximum simulated servers; with more the probabilities are the same


def between(table: tuple[float, ...], count: float) -> float:
    """Interpolate the table for this number of active requests; beyond its end, extrapolate from the last two
    values."""
    right = min(max(bisect.bisect_left(IN_WORK, count), 1), len(IN_WORK) - 1)
    x0, x1, y0, y1 = IN_WORK[right - 1], IN_WORK[right], table[right - 1], table[right]
    return y0 + (y1 - y0) * (count - x0) / (x1 - x0)


@dataclass
class Server:
    """Shares its rate among the active requests. `done`: work each would have received by now, in requests,
    if it had been active from the start; `ends`: value of it at which each request ends."""

    now: float = 0.0
    done: float = 0.0
    ends: list[float] = field(default_factory=list)

    def advance(self, time: float) -> None:
        while self.ends:
            pace = between(RATE, max(1, len(self.ends))) / len(self.ends)
            needed = (self.ends[0] - self.done) / pace
            if self.now + needed > time:
                self.done += (time - self.now) * pace
                break
            self.now += needed
            self.done = heapq.heappop(self.ends)
        self.now = time

    def add(self) -> float:
        """Add a request; return the seconds to its first audio. Beyond the largest measured load it waits."""
        heapq.heappush(self.ends, self.done + 1.0)
        waits = max(0, len(self.ends) - IN_WORK[-1]) / RATE[-1]
        return between(FIRST_AUDIO, min(len(self.ends), IN_WORK[-1])) + waits


def choose(policy: str, servers: list[Server], number: int, now: float, chance: random.Random) -> Server:
    if policy == "in turn":
        return servers[number % len(servers)]
    if policy == "random":
        return chance.choice(servers)
    two = chance.sample(servers, 2)
    for server in two:
        server.advance(now)
    return min(two, key=lambda server: len(server.ends))


def percentile_95(policy: str, count: int, load: float, seconds: float = 20.0) -> float:
    """Return the P95 of the time to first audio, with `load` requests per second for each of `count`
    servers.
    """
    chance = random.Random(1)
    servers = [Server() for _ in range(count)]
    times, now, number = [], 0.0, 0
    while now < seconds:
        now += chance.expovariate(load * count)
        number += 1
        server = choose(policy, servers, number, now, chance)
        server.advance(now)
        first = server.add()
        if now > seconds / 4:  # the servers have filled up by then
            times.append(first)
    return sorted(times)[math.floor(0.95 * len(times))]


def highest_load(policy: str, count: int) -> float:
    """Return the requests per second and server at which first audio arrives within GOAL for 95 %."""
    low, high = 1.0, RATE[-1]
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (middle, high) if percentile_95(policy, count, middle) <= GOAL else (low, middle)
    return low


def print_policies() -> float:
    """Print the table of policies; return the requests per second for one server among many."""
    print("| servers are chosen | requests/s a server, first audio within 0.4 s for 95 % |\n| --- | --- |")
    alone = highest_load("in turn", 1)
    print(f"| one alone; measured: {MEASURED} | {alone:.1f} |")
    for policy in ("random", "in turn", "less busy of two"):
        load = highest_load(policy, SIMULATED)
        print(f"| {policy} | {load:.1f} |")
    return MEASURED * load / alone


def print_sizes(load: float, args: argparse.Namespace) -> None:
    rows = []
    for gpus in (10, 100, 1000):
        # One server in fifty may be starting or broken, at least one.
        working = gpus - max(1, gpus // 50)
        peak = working * load
        mean = peak * args.busy
        characters = mean * AUDIO * CHARACTERS * 3600
        audio = peak * AUDIO
        rows.append(
            (
                f"{gpus:,}",
                f"{peak:,.0f}",
                f"{mean:,.0f}",
                f"{audio * PCM * 8 / 1e9:.2f} / {audio * OPUS * 8 / 1e9:.2f}",
                f"{math.ceil(peak * args.proxy_ms / 1000 / args.proxy_load):,}",
                f"{args.model_gb * gpus:,.0f}",
                f"{args.model_gb * gpus / args.store_gb_s:,.0f}",
                f"{gpus * args.gpu_hour / characters * 1e6:.2f}",
            )
        )
    heads = (
        "GPUs",
        "requests/s at most",
        f"on average ({args.busy:.0%})",
        "audio out at most, Gbit/s: PCM / Opus",
        "cores of proxies",
        "weights read at a start of all, GB",
        f"in seconds, at {args.store_gb_s:g} GB/s",
        "$ a million characters",
    )
    print("| " + " | ".join(heads) + " |\n| " + " | ".join("---" for _ in heads) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="What many GPUs serve and need, after docs/performance.md.")
    parser.add_argument("--gpu_hour", type=float, default=2.5, help="$ for an H100 with its share of a host")
    parser.add_argument("--busy", type=float, default=0.6, help="mean load, of the most")
    parser.add_argument(
        "--proxy_ms", type=float, default=10.0, help="ms of a core for a request's way through"
    )
    parser.add_argument("--proxy_load", type=float, default=0.5, help="share of their time that proxies work")
    parser.add_argument("--model_gb", type=float, default=2.0, help="GB that a server reads when it starts")
    parser.add_argument("--store_gb_s", type=float, default=10.0, help="GB/s of the store that holds them")
    args = parser.parse_args()
    load = print_policies()
    print()
    print_sizes(load, args)


if __name__ == "__main__":
    main()
