"""Summarises all scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from light_tts.tools.evaluation.scores import Score


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Return the figures of some scores; None if not measured. `wer`, `cer`: errors of all takes divided by
    the words or characters of all references; `own_prompt_first`: fraction of the takes that are more similar
    to their own prompt than to every other voice's; counts of takes: `cut_off`, `ran_away`, `with_repeats`,
    `at_limit`; times in seconds."""
    good = [score for score in scores if not score.error]
    compared = [(s.similarity, s.other) for s in good if s.similarity is not None and s.other is not None]
    return {
        "takes": len(scores),
        "failed": len(scores) - len(good),
        "audio_seconds": sum(score.seconds for score in good),
        "wer": _rate((score.word_errors, score.words) for score in good),
        "cer": _rate((score.character_errors, score.characters) for score in good),
        "similarity": _mean(score.similarity for score in good),
        "own_prompt_first": _mean(own > other for own, other in compared),
        "mos": _mean(score.mos for score in good),
        "length_ratio": _mean(score.length_ratio for score in good),
        "cut_off": sum(score.cut_off for score in good),
        "ran_away": sum(score.ran_away for score in good),
        "at_limit": sum(score.at_limit for score in good),
        "with_repeats": sum(bool(score.repeats) for score in good),
        "rtf": _spread(score.rtf for score in good),
        "first_audio": _spread(score.first_audio for score in good),
    }


def report(scores: Sequence[Score]) -> dict[str, Any]:
    """Return everything: `summary`, the same by voice, `failures`, and every take."""
    voices = sorted({score.voice for score in scores})
    return {
        "summary": summarize(scores),
        "voices": {voice: summarize([s for s in scores if s.voice == voice]) for voice in voices},
        "failures": [{"text": score.text, "error": score.error} for score in scores if score.error],
        "takes": [asdict(score) for score in scores],
    }


def _rate(pairs: Iterable[tuple[int | None, int | None]]) -> float | None:
    found = [(errors, words) for errors, words in pairs if errors is not None and words is not None]
    total = sum(words for _, words in found)
    return sum(errors for errors, _ in found) / total if total else None


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    p50, p95 = np.percentile(found, (50, 95))
    return {"mean": float(np.mean(found)), "p50": float(p50), "p95": float(p95), "max": max(found)}


# ---------------------------------------------------------------- text output

# Key in a summary, title, scale, format.
SHOWN = (
    ("wer", "WER, %", 100, ".1f"),
    ("cer", "CER, %", 100, ".1f"),
    ("similarity", "similarity", 1, ".3f"),
    ("own_prompt_first", "own first, %", 100, ".0f"),
    ("mos", "DistillMOS", 1, ".2f"),
    ("length_ratio", "length", 1, ".2f"),
    ("cut_off", "cut off", 1, "d"),
    ("ran_away", "ran away", 1, "d"),
    ("at_limit", "at limit", 1, "d"),
    ("with_repeats", "repeats", 1, "d"),
)


def table(found: dict[str, Any]) -> str:
    """Return a table with one line per voice and one for all, followed by times and failures."""
    rows = [["voice", "takes", "failed", *(title for _, title, _, _ in SHOWN)]]
    for name, figures in [*found["voices"].items(), ("all", found["summary"])]:
        values = [_show(figures[key], scale, form) for key, _, scale, form in SHOWN]
        rows.append([name, str(figures["takes"]), str(figures["failed"]), *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    summary = found["summary"]
    lines.append(f"audio        {summary['audio_seconds']:.1f} s")
    for key, title in (("rtf", "RTF"), ("first_audio", "first audio")):
        if spread := summary[key]:
            shown = "   ".join(f"{name} {value:.3f}" for name, value in spread.items())
            lines.append(f"{title:<12} {shown}")
    lines += [f"failed       {failure['error']}: {failure['text']}" for failure in found["failures"]]
    return "\n".join(lines)


def _show(value: float | None, scale: int, form: str) -> str:
    return "-" if value is None else format(value * scale, form)
