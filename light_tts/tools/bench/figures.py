"""Computes the figures of a run and formats them as a table, CSV and JSON."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from light_tts.tools.bench.client import Outcome
from light_tts.tools.bench.load import LoadRun

SPREAD = ("avg", "p50", "p90", "p95", "p99", "min", "max")
# Key in a point -> title in the table.
SPREADS = {
    "first_audio": "first audio, s",
    "latency": "latency, s",
    "rtf": "RTF",
    "buffer": "needed buffer, s",
    "gap": "largest gap, s",
    "late": "sent late, s",
    "lag": "client's lag, s",
}
SINGLE = (
    *("mode", "concurrency", "rate", "stream", "requests", "succeeded", "failed", "wall_seconds"),
    *("requests_per_second", "audio_seconds", "audio_seconds_per_second", "most_under_way"),
    *("underrun_requests", "underruns", "stall_seconds", "given_up"),
)
CSV_COLUMNS = (*SINGLE, *(f"{key}_{name}" for key in SPREADS for name in SPREAD))
SLOW_CLIENT = 0.05  # seconds; above this, the load generator's own delays affect the figures


def spread(values: list[float]) -> dict[str, float]:
    """Return average, quantiles and extremes; empty for no values."""
    if not values:
        return {}
    quantiles = np.percentile(values, (50, 90, 95, 99))
    found = (np.mean(values), *quantiles, min(values), max(values))
    return {name: float(value) for name, value in zip(SPREAD, found, strict=True)}


def most_under_way(outcomes: list[Outcome]) -> int:
    """Return the maximum number of concurrent requests."""
    starts = [(outcome.start, 1) for outcome in outcomes]
    ends = [(outcome.start + outcome.latency, -1) for outcome in outcomes]
    steps = [step for _, step in sorted(starts + ends)]
    return int(np.cumsum(steps).max()) if steps else 0


def summarize(run: LoadRun) -> dict[str, Any]:
    """Return the figures of a run, with times in seconds. `rtf`: a request's latency divided by the length of
    its audio (below 1: faster than real time); `buffer`: the smallest initial buffering that avoids
    underruns; `gap`: the longest time between two chunks; `late`: how long after its due time it was sent;
    `lag`: delay of the load generator's event loop. Failed requests are counted as errors only."""
    good = [outcome for outcome in run.outcomes if not outcome.error]
    errors = Counter(outcome.error for outcome in run.outcomes if outcome.error)
    audio = sum(outcome.audio for outcome in good)
    per_second = 1 / run.wall if good else 0.0
    return {
        "requests": len(run.outcomes),
        "succeeded": len(good),
        "failed": errors.total(),
        "errors": dict(errors),
        "given_up": run.given_up,
        "wall_seconds": run.wall,
        "requests_per_second": len(good) * per_second,
        "audio_seconds": audio,
        "audio_seconds_per_second": audio * per_second,
        "most_under_way": most_under_way(run.outcomes),
        "underrun_requests": sum(outcome.playback.underruns > 0 for outcome in good),
        "underruns": sum(outcome.playback.underruns for outcome in good),
        "stall_seconds": sum(outcome.playback.stall for outcome in good),
        "latency": spread([outcome.latency for outcome in good]),
        "first_audio": spread([outcome.first_audio for outcome in good]),
        "rtf": spread([outcome.latency / outcome.audio for outcome in good]),
        "buffer": spread([outcome.playback.stall for outcome in good]),
        "gap": spread([outcome.playback.largest_gap for outcome in good]),
        "late": spread([outcome.start - outcome.due for outcome in run.outcomes]),
        "lag": spread(run.lags),
    }


def records(run: LoadRun) -> list[dict[str, Any]]:
    """Return one entry per request, in the order they were sent; `due` in seconds from the first one."""
    outcomes = sorted(run.outcomes, key=lambda outcome: outcome.index)
    first = outcomes[0].due if outcomes else 0.0
    return [
        {**asdict(outcome), "due": outcome.due - first, "start": outcome.start - first}
        for outcome in outcomes
    ]


def slow_client(point: dict[str, Any]) -> str:
    """Return a warning if the load generator itself was late, else an empty string."""
    worst = max(point[key].get("p99", 0.0) for key in ("late", "lag"))
    if worst <= SLOW_CLIENT:
        return ""
    return f"this client was up to {worst:.3f} s late (P99), which adds to the times above"


def load(point: dict[str, Any]) -> str:
    """Return the rate or number of clients as text."""
    return f"{point['rate']:.2f}/s" if point["mode"] == "open" else f"{point['concurrency']}"


def table(point: dict[str, Any]) -> str:
    """Return one run as a table."""
    rows = [("", "".join(f"{name.upper() if name[0] == 'p' else name:>9}" for name in SPREAD))]
    for key, title in SPREADS.items():
        figures = "".join(f"{point[key][name]:9.3f}" for name in SPREAD) if point[key] else "        -"
        rows.append((title, figures))
    audio, rate = point["audio_seconds"], point["audio_seconds_per_second"]
    stalls = f"{point['underruns']} underruns, {point['stall_seconds']:.2f} s of silence"
    rows += [
        ("load", load(point)),
        ("requests", f"{point['succeeded']} of {point['requests']} complete"),
        ("concurrent requests", f"{point['most_under_way']} at most"),
        ("time", f"{point['wall_seconds']:.2f} s"),
        ("throughput", f"{point['requests_per_second']:.2f} requests/s"),
        ("audio", f"{audio:.2f} s made, {rate:.2f} s/s"),
        ("players run dry", f"{point['underrun_requests']} ({stalls})"),
        *(("error", f"{kind}: {count}") for kind, count in sorted(point["errors"].items())),
    ]
    if warning := slow_client(point):
        rows.append(("warning", warning))
    return "\n".join(f"{title:<20}{text}" for title, text in rows)


# Title, width and format of each column of a sweep; the value comes from `flat`.
LINE = (
    ("load", "load", "s"),
    ("requests", "requests", "d"),
    ("failed", "failed", "d"),
    ("req/s", "requests_per_second", ".2f"),
    ("audio s/s", "audio_seconds_per_second", ".1f"),
    ("first P50", "first_audio_p50", ".3f"),
    ("P95", "first_audio_p95", ".3f"),
    ("latency P50", "latency_p50", ".3f"),
    ("P95", "latency_p95", ".3f"),
    ("RTF", "rtf_avg", ".3f"),
    ("dry", "underrun_requests", "d"),
    ("buffer P95", "buffer_p95", ".3f"),
    ("lag P99", "lag_p99", ".3f"),
)


def heading() -> str:
    """Return the header of a table with one line per run."""
    return " ".join(f"{title:>{max(7, len(title))}}" for title, _, _ in LINE)


def line(point: dict[str, Any]) -> str:
    """Return one run as a line of that table."""
    values = flat(point)
    values["load"] = load(point)
    cells = []
    for title, key, form in LINE:
        cell = format(values[key], form) if values.get(key) is not None else "-"
        cells.append(f"{cell:>{max(7, len(title))}}")
    return " ".join(cells)


def flat(point: dict[str, Any]) -> dict[str, Any]:
    """Return the point without nesting, as columns of the CSV file: first_audio_p95 and so on. Missing values
    are None."""
    values = {name: point[name] for name in SINGLE}
    for key in SPREADS:
        values |= {f"{key}_{name}": point[key].get(name) for name in SPREAD}
    return values


def append_csv(path: Path, point: dict[str, Any]) -> None:
    """Append one line to a CSV file; a new file gets the header first."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(flat(point))
