"""Which sampling suits a checkpoint: several rules over the same lines, each scored as scripts/evaluate.py
scores (words, similarity, naturalness, endings), without a server.

    python scripts/search_sampling.py set.jsonl --model_dir pretrained_models/light-tts-mini \
        --rules 0.8/25/0.1 0.5/8/0.2 0.5/8/0.2/10/0.9 --repeats 2 --results search.jsonl

A rule is top_p/top_k/tau_r, then /win_size/temperature if they are not 10 and 1; `yaml` is the checkpoint's
own. All rules are tried on a few lines before the next lines come, so the table, which is printed after each
batch, compares them fairly at any time. What is in --results is not spoken again: a search that was broken
off goes on, and may be given more rules, lines or repeats. `+-` is the standard error of the WER, by lines.
Exit code 2: a file or an argument is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from light_tts.common.sampling_rule import SamplingRule
from light_tts.models.checkpoint.hyperyaml import ConfigError
from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.tools.arguments import parse_count
from light_tts.tools.evaluation.client import TOKENS_PER_SECOND
from light_tts.tools.evaluation.lines import Line, read_lines
from light_tts.tools.evaluation.local import LocalSpeaker, most_tokens
from light_tts.tools.evaluation.report import summarize
from light_tts.tools.evaluation.scores import Score, Scorer
from light_tts.tools.evaluation.takes import Take
from light_tts.tools.evaluation.tools import NEEDS, missing, parse_measures
from light_tts.tools.evaluation.words import language_of

REPEAT = 1000  # offset between the seeds of two repeats
RESAMPLES = 500  # of the bootstrap


def parse_rule(text: str) -> SamplingRule | None:
    """Return the rule, or None for `yaml`."""
    if text == "yaml":
        return None
    try:
        top_p, top_k, tau_r, *rest = text.split("/")
        win_size, temperature = (*rest, *("10", "1")[len(rest) :])
        return SamplingRule(float(top_p), int(top_k), int(win_size), float(tau_r), float(temperature))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not top_p/top_k/tau_r[/win_size[/temperature]]"
        ) from None


def name(rule: SamplingRule) -> str:
    """Return the rule in command-line form."""
    rest = f"/{rule.win_size}/{rule.temperature:g}" if (rule.win_size, rule.temperature) != (10, 1.0) else ""
    return f"{rule.top_p:g}/{rule.top_k}/{rule.tau_r:g}{rest}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("set", type=Path, help="lines of text, prompt_wav, prompt_text, voice")
    add("--model_dir", type=Path, required=True)
    add("--rules", type=parse_rule, nargs="+", default=[None], metavar="RULE", help="see above")
    add("--repeats", type=parse_count, default=1, metavar="N", help="with other seeds")
    add("--limit", type=parse_count, metavar="N", help="only the first N lines")
    add("--lines", type=parse_count, default=8, metavar="N", help="spoken by all rules at a time")
    add("--measures", type=parse_measures, default=",".join(NEEDS), help="some of these, or none")
    add("--results", type=Path, required=True, metavar="FILE", help="a line of JSON for each take")
    add(
        "--redraw",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw a part once more that skipped or repeated words, as a server does by default",
    )
    add("--save", type=Path, metavar="DIR", help="keep the speech there")
    add("--minutes", type=float, default=math.inf, help="begin nothing after so long")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


class Results:
    """The scores so far, by (rule, line, repeat), in an append-only file."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file contains something else."""
        self._path = path
        self.scores: dict[tuple[str, int, int], Score] = {}
        known = {field.name for field in fields(Score)}
        for number, text in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], 1):
            try:
                found = json.loads(text)
                values = {key: value for key, value in found["score"].items() if key in known}
                self.scores[found["rule"], found["line"], found["repeat"]] = Score(**values)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: not a result of a search: {error}") from None

    def add(self, rule: str, line: int, repeat: int, score: Score) -> None:
        self.scores[rule, line, repeat] = score
        found = {"rule": rule, "line": line, "repeat": repeat, "score": asdict(score)}
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found, ensure_ascii=False) + "\n")


def wer_error(scores: Sequence[Score]) -> float | None:
    """Return the standard error of the word error rate, from a bootstrap over lines."""
    pairs = np.array([(s.word_errors, s.words) for s in scores if s.word_errors is not None], float)
    if not len(pairs):
        return None
    drawn = pairs[np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))].sum(1)
    return float(np.std(drawn[:, 0] / drawn[:, 1]))


# Key in a summary, title, width, scale, format.
COLUMNS = (
    ("takes", "takes", 6, 1, "d"),
    ("wer", "WER %", 7, 100, ".1f"),
    ("wer_error", "+-", 6, 100, ".1f"),
    ("cer", "CER %", 7, 100, ".1f"),
    ("mos", "MOS", 6, 1, ".2f"),
    ("similarity", "similar", 9, 1, ".3f"),
    ("length_ratio", "length", 8, 1, ".2f"),
    ("cut_off", "cut", 5, 1, "d"),
    ("ran_away", "away", 6, 1, "d"),
    ("at_limit", "limit", 7, 1, "d"),
    ("with_repeats", "repeats", 9, 1, "d"),
)


def table(results: Results, rules: Sequence[str]) -> str:
    """Return a table with one line per rule."""
    rows = [f"{'rule':<22}" + "".join(title.rjust(width) for _, title, width, _, _ in COLUMNS)]
    for rule in rules:
        scores = [score for (of, _, _), score in results.scores.items() if of == rule]
        found = {**summarize(scores), "wer_error": wer_error(scores)}
        cells = (
            ("-" if found[key] is None else format(found[key] * scale, form)).rjust(width)
            for key, _, width, scale, form in COLUMNS
        )
        rows.append(f"{rule:<22}" + "".join(cells))
    return "\n".join(rows)


def missing_takes(
    lines: Sequence[Line], rules: Sequence[SamplingRule], repeats: int, size: int, results: Results
) -> Iterator[list[tuple[int, int, SamplingRule]]]:
    """Yield batches of (line, repeat, rule) that are not in the results: all rules on `size` lines at a
    time.
    """
    every = [
        (line, repeat, rule)
        for repeat in range(repeats)
        for first in range(0, len(lines), size)
        for line in range(first, min(first + size, len(lines)))
        for rule in rules
    ]
    for _, batch in groupby(every, lambda take: (take[1], take[0] // size)):
        wanted = [take for take in batch if (name(take[2]), take[0], take[1]) not in results.scores]
        if wanted:
            yield wanted


def speak(
    speaker: LocalSpeaker, lines: Sequence[Line], batch: Sequence[tuple[int, int, SamplingRule]]
) -> Iterator[Take]:
    """Speak a batch; identical tokens are spoken only once."""
    seeds = [line + REPEAT * repeat for line, repeat, _ in batch]
    wanted = [(lines[line], rule, seed) for (line, _, rule), seed in zip(batch, seeds, strict=True)]
    known = {}
    for (line, _, _), seed, parts in zip(batch, seeds, speaker.tokens(wanted), strict=True):
        key = (line, seed, *map(tuple, parts))
        if key not in known:
            known[key] = speaker.sound(lines[line], parts, seed)
        yield Take(lines[line], known[key], limit=most_tokens(lines[line]) / TOKENS_PER_SECOND)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    try:
        lines = read_lines(args.set, ("text", "prompt_wav", "prompt_text"))[: args.limit]
        results = Results(args.results)
        speaker = LocalSpeaker(args.model_dir, args.device, args.redraw)
    except (OSError, ValueError, ConfigError, CheckpointError) as error:
        print(f"search_sampling: {error}", file=sys.stderr)
        return 2
    left_out = missing(args.measures, {language_of(line.text) for line in lines})
    for measure, command in left_out.items():
        print(f"search_sampling: {measure} is left out; it needs: {command}", file=sys.stderr)
    rules = list(dict.fromkeys(rule or speaker.numbers.sampling for rule in args.rules))
    scorer = Scorer([measure for measure in args.measures if measure not in left_out])
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
    names, spoken = [name(rule) for rule in rules], 0
    for batch in missing_takes(lines, rules, args.repeats, args.lines, results):
        if time.monotonic() > end:
            break
        takes = list(speak(speaker, lines, batch))
        for (line, repeat, rule), take, score in zip(
            batch, takes, scorer.score_all(takes, lambda score: None), strict=True
        ):
            results.add(name(rule), line, repeat, score)
            if args.save and take.sound is not None:
                take.sound.save(args.save / f"{line:03}_{repeat}_{name(rule).replace('/', '_')}.wav")
        print(table(results, names), end="\n\n", flush=True)
        spoken += len(batch)
    if not spoken:
        print(table(results, names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
