"""Load generator: sends requests to a running server and prints how fast the responses arrived.

    python test/benchmark.py --concurrency 8 --number 64 --stream True     8 clients, 64 requests
    python test/benchmark.py --sweep 1,8,16,32,64 --stream True            one line per number of clients
    python test/benchmark.py --rate 5 --duration 60 --stream True          Poisson arrivals, 5 a second
    python test/benchmark.py --find_rate --duration 30 --stream True       the highest rate it keeps up with

Closed loop (`--concurrency`, `--sweep`): each client sends its next request when the previous one is
complete. Open loop (`--rate`, `--find_rate`): requests are sent at random times, independent of the
responses. Exit code 0: every response was complete (`--find_rate`: a rate was found); 1: some were not (they
are counted by kind); 2: a file or an argument is invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("aiohttp") is None:
    sys.exit("light-tts: bench needs aiohttp: pip install 'light-tts[bench]'")

from light_tts.tools.arguments import parse_count
from light_tts.tools.bench import figures
from light_tts.tools.bench.client import open_session
from light_tts.tools.bench.plot import draw
from light_tts.tools.bench.runs import Benchmark
from light_tts.tools.bench.workload import PRESETS, PROMPT, TEXTS, Workload, read_texts, recording

NUMBER = 10
LEAD_IN = 0.2  # fraction of --duration, with --find_rate


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def parse_counts(text: str) -> list[int]:
    return [parse_count(part.strip()) for part in text.split(",")]


def parse_positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Send requests to a running server and print latencies and throughput.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8080", help="the server")
    add(
        "--timeout",
        type=parse_positive,
        default=300.0,
        help="seconds without data after which a request has failed",
    )

    add = parser.add_argument_group("load").add_argument
    add(
        "--concurrency",
        type=parse_count,
        default=1,
        help="number of clients, each with one request at a time",
    )
    add("--sweep", type=parse_counts, metavar="C,C,...", help="one run per number of clients")
    add(
        "--rate",
        type=parse_positive,
        help="requests per second at random (Poisson) times, instead of clients",
    )
    add("--find_rate", action="store_true", help="search for the highest rate (first try: --rate, or 1)")
    add(
        "--slo_first_audio",
        type=parse_positive,
        default=0.4,
        help="limit of --find_rate: P95 of first audio in seconds",
    )
    add(
        "--precision",
        type=parse_positive,
        default=0.1,
        help="precision of --find_rate as a fraction of the rate",
    )
    add("--number", type=parse_count, help=f"total number of requests (without --duration: {NUMBER})")
    add("--duration", type=parse_positive, help="seconds during which requests are sent, instead of --number")
    add("--warmup", type=int, default=0, help="requests before the first run, not counted")
    add("--lead_in", type=float, help="open loop: seconds of load before requests are counted")
    add("--arrival_seed", type=int, default=0, help="seed of the random times")

    add = parser.add_argument_group("requests").add_argument
    add("--preset", choices=tuple(PRESETS), help="texts, prompt and lengths of published figures")
    add("--stream", type=parse_bool, default=False, help="stream the audio")
    add("--body", choices=("form", "json"), default="form", help="format of the request body")
    add("--text_file", type=Path, help="file of texts to speak, one per line (default: four short sentences)")
    add("--prompt_wav", type=Path, default=PROMPT, help="recording of the voice")
    add("--prompt_seconds", type=parse_positive, help="cut or repeat the recording to this length in seconds")
    add("--prompt_text", help="its transcript (default: the text file next to the recording)")
    add("--spk_id", help="name of a voice, instead of a recording")
    add("--tts_model_name", default="default", help="style")
    add("--new_tokens", type=parse_count, help="number of speech tokens of every part (25 per second)")
    add("--seed", type=int, default=0, help="seed of the first request; incremented for each further one")

    add = parser.add_argument_group("results").add_argument
    add("--csv", type=Path, metavar="FILE", help="append one line per run to this file")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file")
    add("--records", action="store_true", help="include every request and the time of every chunk in --json")
    add("--plot", type=Path, metavar="FILE", help="plot the runs (requires matplotlib)")
    parser.set_defaults(texts=TEXTS)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)
    if args.sweep and (args.rate or args.find_rate):
        parser.error("--sweep is closed loop, --rate and --find_rate are open loop")
    if args.find_rate and not args.duration:
        parser.error("--find_rate requires --duration")
    if args.number and args.duration and not args.sweep:
        parser.error("give either --number or --duration")
    if args.lead_in and not args.duration:
        parser.error("--lead_in requires --duration")
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot requires matplotlib: pip install -c constraints.txt -e '.[bench]'")
    if not args.number and not args.duration:
        args.number = NUMBER
    if args.lead_in is None:
        args.lead_in = LEAD_IN * args.duration if args.find_rate else 0.0
    return args


def make_workload(args: argparse.Namespace) -> Workload:
    """Read the files given by the arguments. Raises OSError or ValueError naming the file."""
    texts = read_texts(args.text_file) if args.text_file else args.texts
    fields: dict[str, Any] = {"stream": args.stream, "tts_model_name": args.tts_model_name}
    if args.new_tokens:
        fields |= {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    if args.spk_id:
        return Workload(texts, {**fields, "spk_id": args.spk_id}, None, args.seed, args.body == "json")
    fields["prompt_text"] = args.prompt_text
    if args.prompt_text is None:
        fields["prompt_text"] = args.prompt_wav.with_suffix(".txt").read_text("utf-8").strip()
    voice = recording(args.prompt_wav, args.prompt_seconds)
    return Workload(texts, fields, voice, args.seed, args.body == "json")


async def run(args: argparse.Namespace, workload: Workload) -> Benchmark:
    """Make the runs requested by the arguments."""
    async with open_session(args.url, args.timeout) as session:
        benchmark = Benchmark(args, workload, session)
        if args.warmup:
            await benchmark.warm_up()
        if args.sweep:
            await benchmark.sweep()
        elif args.find_rate:
            await benchmark.find_rate()
        else:
            await benchmark.single()
        return benchmark


def report(args: argparse.Namespace, benchmark: Benchmark) -> dict[str, Any]:
    """Return the content of --json: the settings with the figures of the run or runs."""
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    if not (args.sweep or args.find_rate):
        return {"settings": settings, **benchmark.points[0]}
    found = {"settings": settings, "points": benchmark.points}
    return found | {"highest_rate": benchmark.highest_rate} if args.find_rate else found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        workload = make_workload(args)
    except (OSError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    benchmark = asyncio.run(run(args, workload))
    if args.json:
        args.json.write_text(json.dumps(report(args, benchmark), indent=2, default=str) + "\n")
    if args.plot:
        draw([figures.flat(point) for point in benchmark.points], args.plot)
    if args.find_rate:
        return 0 if benchmark.highest_rate else 1
    return 1 if any(point["failed"] for point in benchmark.points) else 0


if __name__ == "__main__":
    sys.exit(main())
