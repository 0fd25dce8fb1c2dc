"""The input of an evaluation: JSON lines, each with a text and a voice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """A text with its voice. `voice`: a name that identifies the person; `wav`: existing audio to evaluate;
    `prompt_text`: transcript of `prompt_wav`, None if unknown."""

    text: str
    voice: str
    prompt_wav: Path | None = None
    prompt_text: str | None = None
    wav: Path | None = None

    @property
    def prompt(self) -> tuple[Path, str]:
        """`prompt_wav` and `prompt_text`. Raises ValueError where the line lacks one."""
        if self.prompt_wav is None or self.prompt_text is None:
            raise ValueError(f"the line has no prompt_wav or no prompt_text: {self.text}")
        return self.prompt_wav, self.prompt_text


def read_lines(path: Path, needed: tuple[str, ...]) -> list[Line]:
    """Return the lines of a file; paths in it are relative to it. `needed`: required keys; the voice defaults
    to the name of `prompt_wav`. Raises OSError or ValueError naming the file and the line."""
    found = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        if text.strip():
            try:
                found.append(_line(json.loads(text), path.parent, needed))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: no line in it")
    return found


def _line(values: Any, folder: Path, needed: tuple[str, ...]) -> Line:
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    for key in needed:
        if key not in values:
            raise ValueError(f"{key} is missing")
    for key in ("text", "voice", "prompt_wav", "prompt_text", "wav"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"{key} is not a string")
    files = {key: folder / values[key] for key in ("prompt_wav", "wav") if key in values}
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"{file} is not there")
    voice = values.get("voice") or values.get("prompt_wav") or "unknown"
    return Line(values["text"], voice, files.get("prompt_wav"), values.get("prompt_text"), files.get("wav"))
