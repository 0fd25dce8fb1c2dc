"""How long requests took, from the server's log: count, mean and quantiles of `cost_time <n>ms`.

    python scripts/log_stats.py logs/light-tts.log

`--last N` looks only at the last N timed lines.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import deque
from pathlib import Path

import numpy as np

COST_TIME = re.compile(r"cost_time (\d+(?:\.\d+)?)ms\s*$")


def main() -> int:
    parser = argparse.ArgumentParser(description="Count, mean, P50, P90 and P99 of cost_time in a log.")
    parser.add_argument("log", type=Path, nargs="?", default=Path("logs/light-tts.log"))
    parser.add_argument("--last", type=int, metavar="N", help="only the last N timed lines")
    args = parser.parse_args()
    try:
        with args.log.open(encoding="utf-8", errors="replace") as lines:
            found = (float(match[1]) for match in map(COST_TIME.search, lines) if match)
            times = list(deque(found, maxlen=args.last))
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
