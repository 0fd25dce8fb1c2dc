"""Generates the table of flags in docs/flags.md from Settings.

python scripts/flags_table.py            print the table
python scripts/flags_table.py --write    write it to docs/flags.md between its two markers
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from light_tts.server.core.settings import Settings
from light_tts.tools.generated_section import GeneratedSection


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


SECTION = GeneratedSection(
    page=Path(__file__).resolve().parent.parent / "docs" / "flags.md",
    begin="<!-- flags: written by scripts/flags_table.py -->\n",
    end="<!-- end of flags -->",
    make=flags_table,
)


if __name__ == "__main__":
    SECTION.main()
