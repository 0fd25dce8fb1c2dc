"""Splits long texts into segments that are normalised one by one, so that none keeps others waiting for
long.
"""

from __future__ import annotations

import re
from itertools import accumulate

MAX_COST = 160  # per segment: 0.03 to 0.05 s of wetext on one core
ODD_COST = 4  # per character that is neither a letter nor a space; those cost 1

# Places to cut, in order of preference. The first three never separate text that is read as a unit, like "Dr.
# No", "12, 5 km" or "3.5".
_CUTS = (
    re.compile(r"\n\s*\n|(?:(?<=[a-z]{4})\.|[!?;])[\"')\]”’]*\s+(?!\d)|[。！？；…][”’」』）]*"),
    re.compile(r"(?<=[^\W\d_])(?:[,:]\s+|[，、：])(?=[^\W\d_])"),
    re.compile(r"(?<=[a-z]{3})\s+(?=[a-z]{2})"),
    re.compile(r"\s+"),
)


def segments(text: str) -> list[str]:
    """Split `text` into parts that cost at most MAX_COST each; joined they are the original text."""
    costs = [0, *accumulate(map(_cost, text))]
    parts: list[str] = []
    start = 0
    while costs[-1] - costs[start] > MAX_COST:
        end = start + 1
        while costs[end + 1] - costs[start] <= MAX_COST:
            end += 1
        end = _cut(text, (start + end) // 2, end)
        parts.append(text[start:end])
        start = end
    parts.append(text[start:])
    return parts


def _cost(character: str) -> int:
    return 1 if character.isalpha() or character.isspace() else ODD_COST


def _cut(text: str, least: int, most: int) -> int:
    """Return the last of the best places between `least` and `most`, or `most` if there is none."""
    for pattern in _CUTS:
        ends = [found.end() for found in pattern.finditer(text, least, most)]
        if ends:
            return ends[-1]
    return most
