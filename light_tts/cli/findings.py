"""Prints and counts the findings of `check` and `doctor`, one per line."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "note", "bad"]
_MARKS = {"ok": "  ok ", "note": "note ", "bad": " BAD "}
_COLOURS = {"ok": "\033[32m", "note": "\033[33m", "bad": "\033[31m"}


@dataclass
class Findings:
    """Prints findings as they come. `bad`: number of findings that prevent something from working."""

    bad: list[str] = field(default_factory=list)

    def heading(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def add(self, level: Level, what: str, text: str = "") -> None:
        if level == "bad":
            self.bad.append(what)
        mark = _MARKS[level]
        if sys.stdout.isatty():
            mark = f"{_COLOURS[level]}{mark}\033[0m"
        lines = (text or "").splitlines() or [""]
        print(f"{mark} {what:<22} {lines[0]}".rstrip(), flush=True)
        for line in lines[1:]:
            print(f"{'':28} {line}", flush=True)

    def ok(self, what: str, text: str = "") -> None:
        self.add("ok", what, text)

    def note(self, what: str, text: str = "") -> None:
        self.add("note", what, text)

    def fail(self, what: str, text: str = "") -> None:
        self.add("bad", what, text)
