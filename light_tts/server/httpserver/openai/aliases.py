"""Aliases for voices."""

from __future__ import annotations

import json
from pathlib import Path

OPENAI_VOICES = Path(__file__).with_name("voices.json")


def read_aliases(path: str) -> dict[str, list[str]]:
    """Return alias -> voices in order of preference. Empty `path`: OpenAI's voice names. Raises ValueError
    with a description of what is wrong with the file."""
    file = Path(path or OPENAI_VOICES)
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(table, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in table.values()
    ):
        raise ValueError(f'{file}: a JSON object of the form {{"alias": ["voice", ...]}} is expected')
    return table
