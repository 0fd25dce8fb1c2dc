"""Plots latency, first audio and throughput against load.

    python light_tts/tools/bench/plot.py RESULTS.csv --out FIGURE.png

RESULTS.csv is written by `test/benchmark.py --csv`. Requires matplotlib (pip install -e '.[bench]').
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("time to first audio, s", {"P50": "first_audio_p50", "P95": "first_audio_p95"}),
    ("latency, s", {"P50": "latency_p50", "P95": "latency_p95"}),
    ("audio made, s/s", {"audio": "audio_seconds_per_second"}),
)
LOADS = {"closed": ("concurrency", "concurrent requests"), "open": ("rate", "requests per second")}


def curve(points: Sequence[Mapping[str, Any]], load: str, key: str) -> list[tuple[float, float]]:
    """Return (load, value) of the points that have both, sorted by load. In a CSV file missing values
    are ''.
    """
    both = [(point[load], point[key]) for point in points if point[key] not in (None, "")]
    return sorted((float(x), float(y)) for x, y in both)


def draw(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a plot of runs of one mode (all closed loop or all open loop) to `path`. `points` have the
    columns of the CSV file. Raises ValueError for a mixture, ImportError without matplotlib."""
    modes = {point["mode"] for point in points}
    if len(modes) != 1:
        raise ValueError(f"all runs must have the same mode, found {sorted(modes)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    load, label = LOADS[modes.pop()]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4), layout="constrained")
    for axis, (title, curves) in zip(axes, PANELS, strict=True):
        for name, key in curves.items():
            line = curve(points, load, key)
            axis.plot([x for x, _ in line], [y for _, y in line], marker="o", label=name)
        axis.set(xlabel=label, title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot latency and throughput against load.")
    parser.add_argument("results", type=Path, help="a file written by test/benchmark.py --csv")
    parser.add_argument("--out", type=Path, default=Path("benchmark.png"), help="the picture")
    args = parser.parse_args()
    with args.results.open(newline="", encoding="utf-8") as file:
        draw(list(csv.DictReader(file)), args.out)


if __name__ == "__main__":
    main()
