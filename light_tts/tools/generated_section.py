"""A section of a documentation page that a script generates, between two markers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GeneratedSection:
    """The text that `make` returns, on `page` between the markers `begin` and `end`."""

    page: Path
    begin: str
    end: str
    make: Callable[[], str]

    def read(self, page: Path | None = None) -> str:
        """Return what the page, or another one with the same markers, has between them. Raises ValueError
        if they are missing."""
        page = page or self.page
        _, begin, rest = page.read_text("utf-8").partition(self.begin)
        found, end, _ = rest.partition(self.end)
        if not (begin and end):
            raise ValueError(f"{page} has no section between {self.begin.strip()} and {self.end}")
        return found

    def main(self) -> None:
        """Print the section, or with `--write` as only argument put it into the page."""
        if sys.argv[1:] != ["--write"]:
            print(self.make(), end="")
            return
        old, text = self.read(), self.page.read_text("utf-8")
        text = text.replace(self.begin + old + self.end, self.begin + self.make() + self.end)
        self.page.write_text(text, "utf-8")
