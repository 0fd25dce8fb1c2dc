"""Generates the table of flags in docs/flags.md from Settings.

python scripts/flags_table.py            print the table
python scripts/flags_table.py --write    write it to docs/flags.md between its two markers
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from light_tts.server.core.settings import Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
BEGIN, END = "<!-- flags: written by scripts/flags_table.py -->\n", "<!-- end of flags -->"


def description(hint: Any) -> str:
    """Return the description in `Annotated[..., Meta(description=...)]`."""
    return next(meta.description for meta in reversed(hint.__metadata__) if meta.description)


def default_text(value: Any) -> str:
    """Return a default as a user would type it."""
    if value is None or value in ("", ()):
        return ""
    return f"`{','.join(value) if isinstance(value, tuple) else value}`"


def flags_table() -> str:
    """Return the Markdown table of all settings: flag, default, meaning."""
    hints = get_type_hints(Settings, include_extras=True)
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for field in msgspec.structs.fields(Settings):
        lines.append(
            f"| `--{field.name}` | {default_text(field.default)} | {description(hints[field.name])} |"
        )
    return "\n".join(lines) + "\n"


def table_in(page: str) -> str:
    """Return the table of a page between the markers. Raises ValueError if there is none."""
    found = re.search(re.escape(BEGIN) + "(.*)" + re.escape(END), page, re.DOTALL)
    if found is None:
        raise ValueError("no table of flags between its markers")
    return found[1]


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        page = PAGE.read_text("utf-8")
        PAGE.write_text(page.replace(BEGIN + table_in(page) + END, BEGIN + flags_table() + END), "utf-8")
    else:
        print(flags_table(), end="")


if __name__ == "__main__":
    main()
