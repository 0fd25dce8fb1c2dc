"""Latencies of served requests from the server's log: count, mean and quantiles of `cost_time <n>ms`, and the
number of requests that were not served, by outcome.

    python scripts/log_stats.py logs/light-tts.log

`--last N` restricts it to the last N served requests.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, deque
from pathlib import Path

import numpy as np

COST_TIME = re.compile(r"cost_time (\d+(?:\.\d+)?)ms\s*$")
NOT_SERVED = re.compile(r" route=(?!health )\S+ outcome=(\w+) .* after \d+ms\s*$")


def message(line: str) -> str:
    """Return the message of a line of `--log_format json`; other lines unchanged."""
    if not line.startswith("{"):
        return line
    try:
        return json.loads(line)["message"]
    except (ValueError, KeyError):
        return line


def main() -> int:
    parser = argparse.ArgumentParser(description="Count, mean, P50, P90 and P99 of cost_time in a log.")
    parser.add_argument("log", type=Path, nargs="?", default=Path("logs/light-tts.log"))
    parser.add_argument("--last", type=int, metavar="N", help="only the last N timed lines")
    args = parser.parse_args()
    try:
        with args.log.open(encoding="utf-8", errors="replace") as lines:
            times: deque[float] = deque(maxlen=args.last)
            not_served: Counter[str] = Counter()
            for line in map(message, lines):
                if match := COST_TIME.search(line):
                    times.append(float(match[1]))
                elif match := NOT_SERVED.search(line):
                    not_served[match[1]] += 1
    except OSError as error:
        print(f"log_stats: {error}", file=sys.stderr)
        return 2
    if not times:
        print(f"log_stats: {args.log}: no line ends with cost_time <n>ms", file=sys.stderr)
        return 1
    p50, p90, p99 = np.percentile(times, (50, 90, 99))
    print(f"count {len(times)}")
    for name, value in (("mean", np.mean(times)), ("P50", p50), ("P90", p90), ("P99", p99)):
        print(f"{name:<5} {value:.1f} ms")
    for outcome, count in sorted(not_served.items()):
        print(f"not served: {outcome} {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
