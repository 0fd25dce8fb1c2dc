"""Stores the spoken parts of a long text next to the output file, so that an interrupted run can be
resumed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from light_tts.cli.client import ChosenVoice


class PartsStore:
    """One PCM file per part, named by a hash of everything the sound depends on and the sample rate."""

    def __init__(self, output: Path, voice: ChosenVoice, options: Mapping[str, Any]) -> None:
        self.directory = output.with_name(f"{output.name}.parts")
        recording = hashlib.sha256(voice.recording or b"").hexdigest()
        self._key = repr((voice.name, recording, voice.text, sorted(options.items())))

    def find(self, text: str) -> tuple[int, Path] | None:
        """Return sample rate and file of a stored part, or None."""
        for path in self.directory.glob(f"{self._name(text)}.*.pcm"):
            return int(path.name.split(".")[1]), path
        return None

    def read(self, text: str) -> tuple[int, bytes]:
        """Sample rate and samples of a part. Raises KeyError where it has not been spoken."""
        found = self.find(text)
        if found is None:
            raise KeyError(text)
        rate, path = found
        return rate, path.read_bytes()

    def add(self, text: str, rate: int, pcm: bytes) -> None:
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"{self._name(text)}.{rate}.pcm"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(pcm)
        os.replace(unfinished, path)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _name(self, text: str) -> str:
        return hashlib.sha256(f"{self._key}\0{text}".encode()).hexdigest()[:24]
