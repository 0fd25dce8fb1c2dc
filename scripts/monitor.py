"""Live view of a running server: requests, queues, latencies, processes and GPUs.

    python scripts/monitor.py                   updated in place until Ctrl-C
    python scripts/monitor.py --once --json     a single reading for scripts

Everything except the processes and GPUs of this machine is read from the server's /metrics. Rates are over
the last interval, quantiles over the last minute (with --once: since the server's start).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

QUANTILE_SECONDS = 60.0
STAGES = ("encode", "llm", "decode")
SPEECH_ROUTES = ("zero_shot", "zero_shot_bistream", "bistream")
MB = 2**20


# ---------------------------------------------------------------- /metrics


@dataclass(frozen=True)
class Scrape:
    """One reading of /metrics at `time` (monotonic seconds): (name, labels, value) of every sample."""

    time: float
    samples: tuple[tuple[str, dict[str, str], float], ...] = ()

    @classmethod
    def read(cls, client: httpx.Client) -> Scrape:
        response = client.get("/metrics")
        response.raise_for_status()
        families = text_string_to_metric_families(response.text)
        samples = ((s.name, s.labels, s.value) for family in families for s in family.samples)
        return cls(time.monotonic(), tuple(samples))

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of `light_tts_<name>` over all samples with these labels."""
        return sum(
            value
            for sample, found, value in self.samples
            if sample == f"light_tts_{name}" and labels.items() <= found.items()
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return sums of `light_tts_<name>` by one label, speech requests only."""
        sums: dict[str, float] = {}
        for sample, found, value in self.samples:
            if sample == f"light_tts_{name}" and found.get("route") in SPEECH_ROUTES:
                sums[found[label]] = sums.get(found[label], 0.0) + value
        return sums


def quantiles(name: str, now: Scrape, before: Scrape) -> dict[str, float | None]:
    """Return P50, P90 and P99 in seconds of the values a histogram received between two readings,
    interpolated within the bucket like Prometheus's histogram_quantile; None if there were none."""
    earlier = before.by(f"{name}_bucket", "le")
    counts = {float(le): n - earlier.get(le, 0.0) for le, n in now.by(f"{name}_bucket", "le").items()}
    bounds = sorted(counts)
    found: dict[str, float | None] = {}
    for key, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        rank = q * counts[bounds[-1]] if bounds else 0.0
        found[key] = interpolate(rank, bounds, counts) if rank > 0 else None
    return found


def interpolate(rank: float, bounds: list[float], counts: dict[float, float]) -> float:
    """Return the value at `rank` of a cumulative histogram, or the last finite bound if it is beyond."""
    low, below = 0.0, 0.0
    for bound in bounds:
        if bound == float("inf"):
            break
        if counts[bound] >= rank:
            return low + (bound - low) * (rank - below) / (counts[bound] - below)
        low, below = bound, counts[bound]
    return low


# ---------------------------------------------------------------- this machine


class Processes:
    """The server's processes on this machine: the one that listens on the port, and its descendants."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._port = parts.port or 80
        self._local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        # CPU usage is measured between two reads of the same object
        self._known: dict[int, psutil.Process] = {}

    def read(self) -> list[dict[str, Any]]:
        """Return the processes with CPU in percent of one core since the last call, and memory in MiB with
        shared pages split (PSS)."""
        self._known = {process.pid: self._known.get(process.pid, process) for process in self._find()}
        found = []
        for process in self._known.values():
            try:
                with process.oneshot():
                    is_front = process.ppid() not in self._known
                    found.append(
                        {
                            "pid": process.pid,
                            "name": "front" if is_front else process_name(process.cmdline()),
                            "cpu_percent": process.cpu_percent(),
                            "memory_mb": process.memory_full_info().pss / MB,
                        }
                    )
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def _find(self) -> list[psutil.Process]:
        if not self._local:
            return []
        try:
            listening = {
                psutil.Process(connection.pid)
                for connection in psutil.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
                and connection.laddr.port == self._port
                and connection.pid
            }
            # HTTP workers share the socket of the process that started the supervisor.
            fronts = {
                process
                for worker in listening
                for process in (worker, *worker.parents())
                if any(
                    "light_tts.server.supervision.supervisor" in command(child)
                    for child in process.children()
                )
            }
            return [process for front in fronts for process in (front, *front.children(recursive=True))]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return []


def command(process: psutil.Process) -> list[str]:
    """Return the command line of a process, or an empty list if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def process_name(words: list[str]) -> str:
    """Return `encode 0`, `supervisor`, ... for a command line; `http` for gunicorn's workers."""
    if "--stage" in words:
        return f"{words[words.index('--stage') + 1]} {words[words.index('--index') + 1]}"
    names = {
        "light_tts.server.supervision.supervisor": "supervisor",
        "light_tts.server.supervision.janitor": "janitor",
        "light_tts.models.frontend.spellers": "speller",
    }
    for word in words:
        if word in names:
            return names[word]
    return "http"


class Gpus:
    """Reads every GPU through NVML; none if there is no driver."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            self._handles = []

    def read(self) -> list[dict[str, Any]]:
        found = []
        for index, handle in enumerate(self._handles):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(
                {
                    "index": index,
                    "name": self._nvml.nvmlDeviceGetName(handle),
                    "utilization_percent": self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                    "memory_used_mb": memory.used / MB,
                    "memory_total_mb": memory.total / MB,
                }
            )
        return found


# ---------------------------------------------------------------- the view


def view(now: Scrape, last: Scrape, minute: Scrape, processes: list, gpus: list) -> dict[str, Any]:
    """Return the displayed values. Rates are between `last` and `now`, quantiles between `minute` and
    `now`.
    """
    seconds = max(now.time - last.time, 1e-3)

    def rate(name: str) -> float:
        return max(0.0, now.total(name) - last.total(name)) / seconds

    ended, ended_before = (sum(scrape.by("requests_total", "outcome").values()) for scrape in (now, last))
    return {
        "requests_per_second": max(0.0, ended - ended_before) / seconds,
        "audio_seconds_per_second": rate("audio_seconds_total"),
        "tokens_per_second": rate("llm_tokens_total"),
        "requests": {outcome: int(n) for outcome, n in sorted(now.by("requests_total", "outcome").items())},
        "recoveries": int(now.total("request_recoveries_total")),
        "latency": quantiles("request_duration_seconds", now, minute),
        "first_audio": quantiles("time_to_first_audio_seconds", now, minute),
        "stages": {
            stage: {
                "queue": int(now.total("stage_queue_depth", stage=stage)),
                "restarts": int(now.total("stage_restarts_total", stage=stage)),
            }
            for stage in STAGES
        },
        "llm": {
            name: int(now.total(f"llm_{name}"))
            for name in (
                "running_requests",
                "paused_requests",
                "waiting_requests",
                "kv_slots_used",
                "kv_slots_total",
            )
        },
        "prompt_cache": {
            "hits": int(now.total("prompt_cache_hits_total")),
            "misses": int(now.total("prompt_cache_misses_total")),
        },
        "cpu_percent": sum(process["cpu_percent"] for process in processes),
        "memory_mb": sum(process["memory_mb"] for process in processes),
        "processes": processes,
        "gpus": gpus,
    }


def seconds(value: float | None) -> str:
    return "    -    " if value is None else f"{value:7.3f} s"


def text(shown: dict[str, Any], url: str) -> str:
    """Return the view as text for a terminal."""
    llm, cache = shown["llm"], shown["prompt_cache"]
    outcomes = ", ".join(f"{n} {outcome}" for outcome, n in shown["requests"].items()) or "none yet"
    lines = [
        f"light-tts {url}   {time.strftime('%H:%M:%S')}",
        "",
        f"requests    {shown['requests_per_second']:.2f}/s"
        f"   audio {shown['audio_seconds_per_second']:.2f} s/s"
        f"   speech tokens {shown['tokens_per_second']:.0f}/s",
        f"ended       {outcomes}; {shown['recoveries']} recovered",
        "",
        "                P50        P90        P99",
        "latency     " + "  ".join(seconds(v) for v in shown["latency"].values()),
        "first audio " + "  ".join(seconds(v) for v in shown["first_audio"].values()),
        "",
    ]
    for name, stage in shown["stages"].items():
        lines.append(f"{name:<8} {stage['queue']:>5} waiting   {stage['restarts']} restarts")
    lines += [
        f"llm      {llm['running_requests']:>5} running   {llm['paused_requests']} paused"
        f"   {llm['waiting_requests']} not admitted"
        f"   KV slots {llm['kv_slots_used']} of {llm['kv_slots_total']}",
        f"prompts  {cache['hits']:>5} hits   {cache['misses']} misses",
        "",
        f"{'process':<16}{'pid':>8}{'CPU %':>8}{'MiB':>8}",
    ]
    for process in shown["processes"]:
        lines.append(
            f"{process['name']:<16}{process['pid']:>8}{process['cpu_percent']:>8.0f}"
            f"{process['memory_mb']:>8.0f}"
        )
    lines.append(f"{'all':<24}{shown['cpu_percent']:>8.0f}{shown['memory_mb']:>8.0f}")
    for gpu in shown["gpus"]:
        lines.append(
            f"GPU {gpu['index']} {gpu['name']}   {gpu['utilization_percent']} %"
            f"   {gpu['memory_used_mb']:.0f} of {gpu['memory_total_mb']:.0f} MiB"
        )
    return "\n".join(lines)


def show(output: str, in_place: bool) -> None:
    """Print the output, replacing the previous one on a terminal."""
    if in_place:
        columns, rows = shutil.get_terminal_size()
        fitting = [line[:columns] for line in output.splitlines()[: rows - 1]]
        output = "\x1b[H" + "\x1b[K\n".join(fitting) + "\x1b[J"
    print(output, flush=True)


def watch(args: argparse.Namespace, client: httpx.Client) -> int:
    """Read and show at every interval; only once with --once."""
    processes, gpus = Processes(args.url), Gpus()
    processes.read()
    in_place = sys.stdout.isatty() and not args.json and not args.once
    history = deque([Scrape.read(client)])
    while True:
        time.sleep(args.interval)
        try:
            now = Scrape.read(client)
        except httpx.HTTPError as error:
            if args.once:
                raise
            show(f"light-tts {args.url}: no answer ({error})", in_place)
            continue
        while len(history) > 1 and now.time - history[1].time >= QUANTILE_SECONDS:
            history.popleft()
        minute = Scrape(0.0) if args.once else history[0]
        shown = view(now, history[-1], minute, processes.read(), gpus.read())
        show(json.dumps(shown) if args.json else text(shown, args.url), in_place)
        if args.once:
            return 0
        history.append(now)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Live view of a running server.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between readings")
    parser.add_argument("--once", action="store_true", help="two readings, one picture, then end")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the picture")
    args = parser.parse_args()
    if args.interval <= 0:
        parser.error("--interval must be above 0")
    try:
        with httpx.Client(base_url=args.url, timeout=10.0) as client:
            return watch(args, client)
    except httpx.HTTPError as error:
        print(f"monitor: {args.url}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
