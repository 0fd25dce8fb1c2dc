"""Load generator: sends requests to a running server and prints how fast the answers came.

    python test/benchmark.py --concurrency 8 --number 64 --stream True

Each of `--concurrency` clients sends its next request as soon as its last one is answered, until `--number`
requests are done. Exit code 0: every answer was complete; 1: some were not (they are counted by kind).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "cosyvoice2"
TEXTS = (
    "The morning train was late again, and nobody seemed to mind.",
    "Please leave the keys with the neighbour before you go.",
    "Rain is expected in the north, with some sun towards the evening.",
    "She opened the letter slowly and read it twice.",
)
BYTES_PER_SAMPLE = 2  # 16-bit mono PCM


# ---------------------------------------------------------------- what is sent


@dataclass(frozen=True)
class Workload:
    """The requests of one run; request i speaks text i (round and round) with seed `seed + i`."""

    texts: tuple[str, ...]
    fields: dict[str, Any]
    prompt_wav: bytes | None
    seed: int
    as_json: bool

    def body(self, index: int) -> dict[str, Any]:
        """Keyword arguments of the HTTP call for request `index`."""
        text = self.texts[index % len(self.texts)]
        fields = {**self.fields, "tts_text": text, "seed": self.seed + index}
        if self.as_json:
            if self.prompt_wav is not None:
                fields["prompt_wav"] = base64.b64encode(self.prompt_wav).decode()
            return {"json": fields}
        form = {name: str(value) for name, value in fields.items()}
        if self.prompt_wav is None:
            return {"data": form}
        return {"data": form, "files": {"prompt_wav": ("prompt.wav", self.prompt_wav, "audio/wav")}}


# ---------------------------------------------------------------- what came back


@dataclass
class Outcome:
    """One request as its client saw it. Times are in seconds from the moment it was sent; `error` is the kind
    of failure, empty where the answer was complete."""

    latency: float = 0.0
    first_audio: float = 0.0
    audio: float = 0.0
    error: str = ""


async def speak(client: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    """Send one request and take its whole answer."""
    outcome = Outcome()
    received = 0
    start = time.perf_counter()
    try:
        async with client.stream("POST", "/inference_zero_shot", **body) as response:
            if response.status_code != 200:
                outcome.error = f"HTTP {response.status_code}"
                return outcome
            sample_rate = int(response.headers["x-sample-rate"])
            async for piece in response.aiter_raw():
                if not received:
                    outcome.first_audio = time.perf_counter() - start
                received += len(piece)
        outcome.audio = received / BYTES_PER_SAMPLE / sample_rate
        if not received:
            outcome.error = "no audio"
    except httpx.TimeoutException:
        outcome.error = "timeout"
    except httpx.RemoteProtocolError:
        outcome.error = "incomplete answer"
    except httpx.TransportError as error:
        outcome.error = type(error).__name__
    finally:
        outcome.latency = time.perf_counter() - start
    return outcome


# ---------------------------------------------------------------- when it is sent


async def closed_loop(
    client: httpx.AsyncClient, workload: Workload, number: int, concurrency: int, progress: Progress
) -> list[Outcome]:
    """`concurrency` clients, each with one request under way at any time."""
    indices = iter(range(number))
    outcomes: list[Outcome] = []

    async def one_client() -> None:
        for index in indices:
            outcomes.append(await speak(client, workload.body(index)))
            progress.show(outcomes)

    await asyncio.gather(*(one_client() for _ in range(min(concurrency, number))))
    return outcomes


@dataclass
class Progress:
    """One line on stderr, rewritten at most five times a second."""

    number: int
    start: float = field(default_factory=time.perf_counter)
    shown: float = 0.0

    def show(self, outcomes: list[Outcome]) -> None:
        now = time.perf_counter()
        finished = len(outcomes) == self.number
        if now - self.shown < 0.2 and not finished:
            return
        self.shown = now
        errors = sum(bool(outcome.error) for outcome in outcomes)
        line = f"\r{len(outcomes)}/{self.number} done, {errors} failed, {now - self.start:.0f} s"
        print(line, end="\n" if finished else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- what it means


def spread(values: list[float]) -> dict[str, float]:
    """Average, quantiles and extremes; empty where there is nothing."""
    if not values:
        return {}
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    found = {
        "avg": np.mean(values),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "min": min(values),
        "max": max(values),
    }
    return {name: float(value) for name, value in found.items()}


def summarize(outcomes: list[Outcome], wall: float) -> dict[str, Any]:
    """Figures of a run that took `wall` seconds. Times in seconds; `rtf` is a request's latency divided by
    the length of its audio (below 1: faster than the audio plays). Failed requests count as errors only."""
    good = [outcome for outcome in outcomes if not outcome.error]
    return {
        "requests": len(outcomes),
        "succeeded": len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "wall_seconds": wall,
        "requests_per_second": len(good) / wall,
        "audio_seconds": sum(outcome.audio for outcome in good),
        "audio_seconds_per_second": sum(outcome.audio for outcome in good) / wall,
        "latency": spread([outcome.latency for outcome in good]),
        "first_audio": spread([outcome.first_audio for outcome in good]),
        "rtf": spread([outcome.latency / outcome.audio for outcome in good]),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    columns = ("avg", "p50", "p90", "p99", "min", "max")
    lines = [" " * 20 + "".join(f"{name.upper() if name[0] == 'p' else name:>9}" for name in columns)]
    for key, title in (("latency", "latency, s"), ("first_audio", "first audio, s"), ("rtf", "RTF")):
        figures = "".join(f"{summary[key][name]:9.3f}" for name in columns) if summary[key] else "        -"
        lines.append(f"{title:<20}{figures}")
    lines.append(f"{'requests':<20}{summary['succeeded']} of {summary['requests']} complete")
    lines.append(f"{'time':<20}{summary['wall_seconds']:.2f} s")
    lines.append(f"{'throughput':<20}{summary['requests_per_second']:.2f} requests/s")
    audio, rate = summary["audio_seconds"], summary["audio_seconds_per_second"]
    lines.append(f"{'audio':<20}{audio:.2f} s made, {rate:.2f} s/s")
    for kind, count in sorted(summary["errors"].items()):
        lines.append(f"{'error':<20}{kind}: {count}")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def parse_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Send requests to a running server and print latencies and throughput.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8080", help="the server")
    add("--concurrency", type=parse_count, default=1, help="clients, each with one request under way")
    add("--number", type=parse_count, default=10, help="requests in all")
    add("--stream", type=parse_bool, default=False, help="ask for audio while it is made")
    add("--body", choices=("form", "json"), default="form", help="multipart form or JSON")
    add("--text_file", type=Path, help="texts to speak, one a line (default: four short sentences)")
    add("--prompt_wav", type=Path, default=GOLDEN / "prompt.wav", help="recording of the voice")
    add("--prompt_text", help="what is said in it (default: the text file beside the recording)")
    add("--spk_id", help="a voice that the server knows, instead of a recording")
    add("--tts_model_name", default="default", help="style")
    add(
        "--new_tokens",
        type=parse_count,
        help="make every part exactly so many speech tokens long (25 a second)",
    )
    add("--seed", type=int, default=0, help="seed of the first request; each next one has the next seed")
    add("--timeout", type=float, default=300.0, help="seconds without a byte after which a request failed")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file as well")
    return parser.parse_args()


def make_workload(args: argparse.Namespace) -> Workload:
    """Read the files that the arguments name. Raises OSError or ValueError naming the file."""
    texts = TEXTS
    if args.text_file:
        texts = tuple(line.strip() for line in args.text_file.read_text("utf-8").splitlines() if line.strip())
        if not texts:
            raise ValueError(f"{args.text_file}: no text in it")
    fields: dict[str, Any] = {"stream": args.stream, "tts_model_name": args.tts_model_name}
    if args.new_tokens:
        fields |= {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    if args.spk_id:
        return Workload(texts, {**fields, "spk_id": args.spk_id}, None, args.seed, args.body == "json")
    fields["prompt_text"] = args.prompt_text
    if args.prompt_text is None:
        fields["prompt_text"] = args.prompt_wav.with_suffix(".txt").read_text("utf-8").strip()
    return Workload(texts, fields, args.prompt_wav.read_bytes(), args.seed, args.body == "json")


async def run(args: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=args.concurrency)
    async with httpx.AsyncClient(base_url=args.url, timeout=args.timeout, limits=limits) as client:
        start = time.perf_counter()
        outcomes = await closed_loop(client, workload, args.number, args.concurrency, Progress(args.number))
        return summarize(outcomes, time.perf_counter() - start)


def main() -> int:
    args = parse_args()
    try:
        workload = make_workload(args)
    except (OSError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    summary = asyncio.run(run(args, workload))
    print(table(summary))
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"settings": settings, **summary}, indent=2, default=str) + "\n")
    return 1 if summary["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
