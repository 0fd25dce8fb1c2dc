"""Evaluates the speech of a running server: intelligibility, similarity to the voice, naturalness, correct
endings and speed.

    python scripts/evaluate.py set.jsonl --url http://localhost:8080 --json report.json --save speech
    python scripts/evaluate.py --wavs speech/list.jsonl          existing audio

A set consists of JSON lines with text, prompt_wav, prompt_text and voice (lines with the same name are the
same person); a list of audio files has wav and text, and prompt_wav and voice for the similarity. Paths are
relative to the file. English is recognised, and Chinese, where each character counts as a word. A request
that fails is counted and does not end the run. Exit code 0: everything was spoken and scored; 1: some was
not; 2: a file or an argument is invalid, or the server is not reachable.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from light_tts.tools.arguments import parse_count
from light_tts.tools.evaluation.client import MODES, Server, SpeechError
from light_tts.tools.evaluation.lines import Line, read_lines
from light_tts.tools.evaluation.progress import EvaluationProgress
from light_tts.tools.evaluation.report import report, summarize, table
from light_tts.tools.evaluation.scores import Score, Scorer
from light_tts.tools.evaluation.sound import read_sound
from light_tts.tools.evaluation.takes import Take, read_takes
from light_tts.tools.evaluation.tools import NEEDS, missing, parse_measures
from light_tts.tools.evaluation.words import language_of


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score the speech of a running server, or existing audio.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("set", type=Path, nargs="?", help="lines of text, prompt_wav, prompt_text, voice")
    add(
        "--wavs", type=Path, metavar="LIST", help="score these instead: lines of wav, text, prompt_wav, voice"
    )
    add("--limit", type=parse_count, metavar="N", help="only the first N lines")
    add("--measures", type=parse_measures, default=",".join(NEEDS), help="some of these, or none")
    add("--json", type=Path, metavar="FILE", help="write the figures of the run and of every take")

    add = parser.add_argument_group("server").add_argument
    add("--url", default="http://localhost:8080", help="the server")
    add(
        "--mode",
        choices=MODES,
        default="whole",
        help="complete responses, streams, or text in pieces (WebSocket)",
    )
    add("--concurrency", type=parse_count, default=2, help="number of concurrent requests")
    add("--seed", type=int, default=0, help="seed of the first request; incremented for each further one")
    add("--tts_model_name", default="default", help="style")
    add("--timeout", type=float, default=300.0, help="seconds without data after which a request has failed")
    add("--save", type=Path, metavar="DIR", help="save the speech in this folder, with a list for --wavs")
    args = parser.parse_args(argv)
    if (args.set is None) == (args.wavs is None):
        parser.error("give either a set or --wavs")
    if args.save and args.wavs:
        parser.error("--save stores a server's speech and cannot be combined with --wavs")
    return args


def read(args: argparse.Namespace) -> list[Line]:
    """Return the lines given by the arguments. Raises OSError or ValueError naming the invalid file."""
    if args.wavs:
        lines = read_lines(args.wavs, ("wav", "text"))[: args.limit]
    else:
        lines = read_lines(args.set, ("text", "prompt_wav", "prompt_text"))[: args.limit]
    for prompt in {line.prompt_wav for line in lines if line.prompt_wav}:
        read_sound(prompt)  # check prompts now rather than in the middle of the run
    return lines


async def speak(args: argparse.Namespace, lines: list[Line]) -> list[Take]:
    """Let the server speak the lines. Raises SpeechError if it is not reachable."""
    server = Server(args.url, args.mode, args.tts_model_name, args.timeout)
    await server.check()
    progress, done, failed = EvaluationProgress(len(lines)), 0, 0

    def show(take: Take) -> None:
        nonlocal done, failed
        done, failed = done + 1, failed + bool(take.error)
        if take.error:
            progress.note(f"failed: {take.error}: {take.line.text}")
        progress.show("spoken", done, f", {failed} failed")

    return await server.speak_all(lines, args.seed, args.concurrency, show)


def score(args: argparse.Namespace, takes: list[Take], measures: list[str]) -> list[Score]:
    progress, scores = EvaluationProgress(len(takes)), []

    def show(found: Score) -> None:
        scores.append(found)
        wer = summarize(scores)["wer"]
        progress.show("scored", len(scores), "" if wer is None else f", WER {100 * wer:.1f} %")

    return Scorer(measures).score_all(takes, show)


def save(takes: list[Take], folder: Path) -> None:
    """Write the audio as NNNNN.wav, with a list.jsonl for --wavs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "list.jsonl").open("w", encoding="utf-8") as lines:
        for number, take in enumerate(takes):
            if take.sound is None:
                continue
            name = f"{number:05}.wav"
            take.sound.save(folder / name)
            line = take.line
            prompt_wav, prompt_text = line.prompt
            values = {"wav": name, "text": line.text, "voice": line.voice}
            values |= {"prompt_wav": str(prompt_wav.resolve()), "prompt_text": prompt_text}
            lines.write(json.dumps(values, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    begun = time.monotonic()
    try:
        lines = read(args)
        left_out = missing(args.measures, {language_of(line.text) for line in lines})
        for measure, command in left_out.items():
            print(f"evaluate: {measure} is left out; it needs: {command}", file=sys.stderr)
        measures = [measure for measure in args.measures if measure not in left_out]
        takes = list(read_takes(lines)) if args.wavs else asyncio.run(speak(args, lines))
        if args.save:
            save(takes, args.save)
        scores = score(args, takes, measures)
    except (OSError, ValueError, SpeechError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    found = {"settings": settings, "left_out": left_out, **report(scores)}
    found["wall_seconds"] = time.monotonic() - begun
    print(table(found))
    print(f"this took    {found['wall_seconds']:.1f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2, default=str, ensure_ascii=False) + "\n", "utf-8")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
