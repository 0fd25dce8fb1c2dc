"""Splits a text so that normalising the groups one by one gives the same result as normalising the whole.

The text is cut at the first place where the text before it and the known text after it allow, so cuts depend
on the text alone and not on how it arrived. The rules follow wetext's grammars. English: a word of letters is
independent unless a number or an abbreviation is up to three words before it ("5 sq ft", "12 Main Street",
"World War II"), or unless it is one that a number may follow ("May 5", "No. 5", "call 555 1234"). Chinese: a
number depends on a few characters before and after it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from light_tts.common.speakable import is_speakable
from light_tts.models.frontend.kept_tokens import PRIVATE, is_hidden

MAX_GROUP = 200  # characters; a text without a place to cut is cut at this length

_HAN = re.compile(r"[\u4e00-\u9fff]")
CONTROL = re.compile(f"[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff{PRIVATE}]")  # never spoken

_WORD = re.compile(r"\S+")
_AROUND = "\"'“”‘’()[]{}*_.,;:!?…"
_LETTERS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_CLAUSE_END = re.compile(r"(?:[,;:!?]|\d\.)[\"'”’)\]]*$")
_REACH = 3  # number of words that a number or an abbreviation may combine with
_LEADING_WORDS = """
january february march april may june july august september october november december
jan feb mar apr jun jul aug sep sept oct nov dec mon tu tue tues wed th thu thur thurs fri sat sun
no per call hit my reach reached ip ssn
"""
_LEADING = frozenset(_LEADING_WORDS.split())

_BEHIND_A_NUMBER = 6  # characters
_BEFORE_A_NUMBER = 4
_CHINESE_ENDS = "。！？；\n"


class Group(NamedTuple):
    """`language`: zh, en, or None if the text must not be changed; `forced`: cut because of its length."""

    text: str
    language: str | None
    forced: bool = False


class TextGroups:
    """The groups of a text that arrives in pieces, with hidden tokens. At most MAX_GROUP characters and a few
    more are held back.

    The text is English until the first Chinese character and Chinese from then on, like a whole text that
    contains one. From `<|` and `|>` on it is not changed.
    """

    def __init__(self, language: str = "en") -> None:
        self._language: str | None = language
        self._waiting = ""
        self._begun = False

    def append(self, text: str) -> list[Group]:
        """Return the groups that later text cannot change. `text`: without control characters."""
        text = self._waiting + text
        if not self._begun:
            text = text.lstrip()
        groups: list[Group] = []
        start = 0
        while start < len(text):
            group = self._first(text, start)
            if group is None:
                break
            groups.append(group)
            start += len(group.text)
        self._waiting = text[start:]
        self._begun = self._begun or bool(groups)
        return groups

    def finish(self) -> list[Group]:
        """Return the rest of the text without trailing whitespace."""
        rest, self._waiting = self._waiting.rstrip(), ""
        return [self._group(rest)] if rest else []

    def _first(self, text: str, start: int) -> Group | None:
        if self._language is None:
            return Group(text[start:], None)
        window = start + MAX_GROUP
        known = window + _BEFORE_A_NUMBER  # later text has no influence
        end = None
        if self._language == "en":
            end = _english_cut(text, start)
            if _HAN.search(text, start, end or known):
                self._language = "zh"
        if self._language == "zh":
            end = _chinese_cut(text, start)
        if end is not None:
            return self._group(text[start:end])
        if len(text) < known:
            return None
        return self._group(text[start : _last_resort(text, start, window)], forced=True)

    def _group(self, text: str, forced: bool = False) -> Group:
        if "<|" in text and "|>" in text:
            self._language = None
        return Group(text, self._language, forced)


def _english_cut(text: str, start: int) -> int | None:
    """Return the end of the first words that do not depend on what follows, including the space after
    them.
    """
    reach = 0
    for match in _WORD.finditer(text, start, start + MAX_GROUP + 1):
        if match.end() >= min(len(text), start + MAX_GROUP):
            return None
        word = match[0]
        if is_hidden(word[-1]):
            return match.end() + 1
        core = word.strip(_AROUND)
        letters = _LETTERS.fullmatch(core)
        reach = max(0, reach - 1) if letters and core != "World" else _REACH
        if _CLAUSE_END.search(word):
            reach = 0
        if not letters or core == "World" or reach or _leads(core):
            continue
        if word[-1] == ",":  # may be followed by the abbreviation of a state, as in "Jackson, MS"
            ahead = _WORD.search(text, match.end(), start + MAX_GROUP)
            if ahead is None:
                return None
            if ahead[0][0].isupper():
                continue
        return match.end() + 1
    return None


def _leads(core: str) -> bool:
    """Return whether a number after the word may be read together with it."""
    last = core.rpartition("-")[2].lower()
    return len(last) == 1 or last in _LEADING


def _chinese_cut(text: str, start: int) -> int | None:
    number = start - _BEHIND_A_NUMBER - 1  # position of the last digit
    speakable = False
    for end in range(start + 1, min(len(text), start + MAX_GROUP + 1)):
        before = text[end - 1]
        if before.isdecimal():
            number = end - 1
        speakable = speakable or is_speakable(before)
        if not speakable or before == " " or ("!" <= before <= "~" and "!" <= text[end] <= "~"):
            continue
        if before in _CHINESE_ENDS:
            return end
        if end - number <= _BEHIND_A_NUMBER:
            continue
        ahead = text[end : end + _BEFORE_A_NUMBER]
        if len(ahead) < _BEFORE_A_NUMBER:
            return None
        if not any(character.isdecimal() for character in ahead):
            return end
    return None


def _last_resort(text: str, start: int, window: int) -> int:
    """Return the position after the last space in the window that has text before it, or the window's end."""
    part = text[start:window]
    blank = len(part.rstrip()) if part[-1:].isspace() else max(part.rfind(" "), part.rfind("\n"))
    if blank > len(part) - len(part.lstrip()):
        return start + blank + 1
    return window + 1 if text[window].isspace() else window
