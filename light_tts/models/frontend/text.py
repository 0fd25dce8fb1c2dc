"""Converts written text to speakable text, in pieces of a length that the model speaks well."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from light_tts.common.speakable import is_speakable
from light_tts.models.frontend.kept_tokens import PRIVATE, KeptTokens, around_tokens, is_hidden
from light_tts.models.frontend.long_sentences import shorten
from light_tts.models.frontend.plain_english import PlainEnglish
from light_tts.models.frontend.segments import segments
from light_tts.models.frontend.spellers import Spell, wetext_spellers
from light_tts.models.frontend.text_groups import CONTROL, Group
from light_tts.models.frontend.turns import Turns

if TYPE_CHECKING:
    import inflect

logger = logging.getLogger(__name__)

MAX_LENGTH = 80  # length of a piece: characters in Chinese, tokens in other languages
MIN_LENGTH = 60  # a piece ends only beyond this length
MERGE_LENGTH = 20  # a last piece shorter than this is appended to the previous one
# longer ones are split; together with the preceding text of its piece it takes less than a minute
LONGEST_SENTENCE = 120

_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_DIGITS = re.compile(r"\d+")
_COMMAS = "，,、"
_BLANK_NOT_IN_ASCII = re.compile(f"(?<![!-~{PRIVATE}]) | (?![!-~{PRIVATE}])")  # hidden tokens count as ASCII
_CHINESE_SYMBOLS = str.maketrans(
    {
        "\n": None,
        "（": None,
        "）": None,
        "【": None,
        "】": None,
        "`": None,
        "²": "平方",
        "³": "立方",
        ".": "。",
    }
)
END_MARKS = {"zh": "。？！；：、.?!;", "en": ".?!;:"}
FULL_STOP = {"zh": "。", "en": "."}
CLOSING_QUOTES = ('"', "”")


Wanted = Callable[[], bool]  # whether the result is still wanted; called repeatedly


class Abandoned(Exception):
    """The result is no longer wanted."""


def always() -> bool:
    return True


class TextNormalizer:
    """Normalises and splits texts. `count_tokens` measures text that is not Chinese; `spellers` handle
    `at_once` texts at a time (default: wetext in this process); `kept` are tokens that remain as they are.
    Thread-safe if the others are.

    Long texts are normalised in segments, so that other texts can run in between.
    """

    def __init__(
        self,
        count_tokens: Callable[[str], int],
        spellers: dict[str, Spell] | None = None,
        at_once: int = 1,
        kept: Sequence[str] = (),
    ) -> None:
        self.kept = KeptTokens(kept)
        self._count_tokens = lambda hidden: count_tokens(self.kept.show(hidden))
        self._spellers = dict(wetext_spellers() if spellers is None else spellers)
        self._turns = Turns(at_once)
        self._plain = PlainEnglish(self._spellers.get("en", str))  # not called without English

    def normalize(self, text: str, wanted: Wanted = always) -> str:
        """Return the whole text as it will be spoken. Text with `<|` and `|>` is returned unchanged. Raises
        Abandoned when the result is no longer wanted."""
        return self.kept.show(self._normalize(text, wanted)[0])

    def split(self, text: str, wanted: Wanted = always) -> list[str]:
        """Return the same in pieces, without those that contain only symbols."""
        text, language = self._normalize(text, wanted)
        if language is None:
            return [text]
        length = len if language == "zh" else self._count_tokens
        sentences: list[str] = []
        for sentence in split_sentences(text, language):
            too_long = length(sentence) > LONGEST_SENTENCE
            sentences += shorten(sentence, length, MAX_LENGTH) if too_long else [sentence]
        pieces = map(self.kept.show, pack_sentences(sentences, length))
        return [piece for piece in pieces if is_speakable(piece)]

    def at_once(self, text: str) -> bool:
        """Whether `normalize` and `split` need no speller, so that they take well under a millisecond."""
        text, language = self._cleaned(text)
        if language is None or language not in self._spellers:
            return True
        return language == "en" and all(map(self._stays, around_tokens(text)))

    def _normalize(self, text: str, wanted: Wanted) -> tuple[str, str | None]:
        """Return (normalised text, with hidden tokens, its language: zh, en, or None if it must not be
        changed)."""
        text, language = self._cleaned(text)
        if language is None:
            return text, None
        spelled = self._spell(text, language, wanted)
        if language == "zh":
            return end_chinese(tidy_chinese(spelled)), language
        return _DIGITS.sub(_number_in_words, spelled), language

    def spell(self, group: Group) -> str:
        """Expand numbers and the like in a group, whose tokens are hidden. Whitespace becomes one space
        between words in English, and at most one at the end; in Chinese it is unchanged."""
        text = group.text
        if group.language == "zh":
            words = text.strip()
            return text.replace(words, self._spell(words, "zh", always)) if words else text
        if group.language == "en":
            words = " ".join(text.split())
            blank = " " if words and text[-1].isspace() else ""
            return _DIGITS.sub(_number_in_words, self._spell(words, "en", always)) + blank
        return text

    def _spell(self, text: str, language: str, wanted: Wanted) -> str:
        """Expand the text as far as the grammars can parse it; the rest is spoken as written."""
        if language not in self._spellers or not text:
            return text
        spelled = ""
        parts = [part for stretch in around_tokens(text) for part in segments(stretch)]
        for number, segment in enumerate(parts):
            inner = segment.strip()
            if is_hidden(inner) or not inner or (language == "en" and self._plain.known(inner)):
                spelled += segment
                continue
            before, after = (" " * bool(blanks) for blanks in segment.split(inner, 1))  # as wetext does
            try:
                with self._turns.turn(number):
                    if not wanted():
                        raise Abandoned
                    spelled += before + self._spell_segment(inner, language) + after
            except Abandoned:
                raise
            except Exception as error:
                logger.warning("text normalisation failed, leaving the text unchanged: %r", error)
                return spelled + "".join(parts[number:])
        return spelled

    def _spell_segment(self, text: str, language: str) -> str:
        if language == "en":
            text = " ".join(text.split())  # wetext fails on two consecutive spaces
            if self._plain(text):
                return text
        return self._spellers[language](text)

    def _stays(self, text: str) -> bool:
        """Whether an English stretch or hidden tokens certainly remain as they are."""
        inner = text.strip()
        return is_hidden(inner) or not inner or self._plain.known(inner)

    def _cleaned(self, text: str) -> tuple[str, str | None]:
        """Return (the text to normalise, with hidden tokens, its language: zh, en, or None if it must not be
        changed)."""
        if not text or ("<|" in text and "|>" in text):
            return text, None
        text = CONTROL.sub("", text).strip()
        language = "zh" if _CHINESE.search(text) else "en"
        hidden = self.kept.hide(text)
        return hidden if hidden == text or language == "zh" else " ".join(hidden.split()), language


_inflecting = threading.Lock()  # the engine is stateful


def _number_in_words(digits: re.Match[str]) -> str:
    import inflect  # takes seconds to import, and wetext leaves hardly any digits

    with _inflecting:
        numbers = _inflect_engine()
        try:
            return str(numbers.number_to_words(digits[0]))
        except inflect.NumOutOfRangeError:  # numbers of 37 digits and more are read digit by digit
            return str(numbers.number_to_words(digits[0], group=1, comma=""))


@lru_cache(1)
def _inflect_engine() -> inflect.engine:
    import inflect

    return inflect.engine()


def tidy_chinese(text: str, before: str = "") -> str:
    """Remove spaces and unspoken symbols. `before`: the character before the text, which is not a space."""
    text = _BLANK_NOT_IN_ASCII.sub("", before + text.replace("\n", ""))[len(before) :]
    return text.translate(_CHINESE_SYMBOLS).replace(" - ", "，").replace("——", " ")


def end_chinese(text: str) -> str:
    """Replace trailing commas by a full stop."""
    without = text.rstrip(_COMMAS)
    return text if without == text else without + "。"


def split_sentences(text: str, language: str) -> list[str]:
    """Split after each end mark. A closing quote stays with the sentence before it, and a mark directly after
    another one is dropped. A missing final mark is added."""
    marks = END_MARKS[language]
    if not text:
        return []
    if text[-1] not in marks:
        text += FULL_STOP[language]
    sentences: list[str] = []
    start = 0
    for i, character in enumerate(text):
        if character not in marks:
            continue
        if i > start:
            sentences.append(text[start : i + 1])
        start = i + 1
        if text[start : start + 1] in CLOSING_QUOTES and sentences:
            sentences[-1] += text[start]
            start += 1
    return sentences


def pack_sentences(sentences: list[str], length: Callable[[str], int]) -> list[str]:
    """Join sentences greedily into pieces of at most MAX_LENGTH, if possible."""
    pieces: list[str] = []
    current = ""
    for sentence in sentences:
        if length(current + sentence) > MAX_LENGTH and length(current) > MIN_LENGTH:
            pieces.append(current)
            current = ""
        current += sentence
    if current:
        if pieces and length(current) < MERGE_LENGTH:
            pieces[-1] += current
        else:
            pieces.append(current)
    return pieces
