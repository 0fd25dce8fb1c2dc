"""Normalises text incrementally."""

from __future__ import annotations

from light_tts.models.frontend.text import (
    CLOSING_QUOTES,
    END_MARKS,
    FULL_STOP,
    TextNormalizer,
    end_chinese,
    tidy_chinese,
)
from light_tts.models.frontend.text_groups import CONTROL, Group, TextGroups


class NormalizedStream:
    """Normalises text that arrives in pieces; trailing whitespace has no effect."""

    def __init__(self, normalizer: TextNormalizer, language: str = "en") -> None:
        self._normalizer = normalizer
        self._kept = normalizer.kept
        self._begun = ""  # an incomplete special token
        self._groups = TextGroups(language)
        self._chinese = ChineseTidier()

    def append(self, text: str) -> list[Group]:
        """Return the normalised text that later text cannot change."""
        text = self._begun + CONTROL.sub("", text)
        end = self._kept.complete(text)
        self._begun = text[end:]
        return [self._normalized(group) for group in self._groups.append(self._kept.hide(text[:end]))]

    def finish(self) -> list[Group]:
        """Return the rest."""
        groups = self._groups.append(self._begun) + self._groups.finish()
        rest = [self._normalized(group) for group in groups]
        tidied = self._kept.show(self._chinese.finish())
        return [*rest, Group(tidied, "zh")] if tidied else rest

    def _normalized(self, group: Group) -> Group:
        text, chinese = self._normalizer.spell(group), self._chinese
        tidied = chinese.append(text) if group.language == "zh" else chinese.finish() + text
        return group._replace(text=self._kept.show(tidied))


class ChineseTidier:
    """Removes spaces and unspoken symbols from Chinese text that arrives in pieces."""

    _UNSETTLED = "- ，,、—（）【】`"  # held back until the next character is known

    def __init__(self) -> None:
        self._before = ""  # the last character returned, before processing
        self._waiting = ""

    def append(self, text: str) -> str:
        """Return the text that later text cannot change."""
        text = self._waiting + text.replace("\n", "")
        settled = len(text.rstrip(self._UNSETTLED))
        self._waiting = text[settled:]
        return self._tidy(text[:settled])

    def finish(self) -> str:
        """Return the rest; the Chinese text ends here."""
        rest, self._waiting = self._waiting.rstrip(" "), ""
        return end_chinese(self._tidy(rest))

    def _tidy(self, text: str) -> str:
        before = self._before
        self._before = text[-1:] or before
        return tidy_chinese(text, before)


class SentenceMarks:
    """Applies the punctuation rules of `split_sentences` to text that arrives in pieces."""

    def __init__(self) -> None:
        self._language: str | None = None
        self._after_mark = True  # or at the beginning
        self._quote_may_follow = False
        self._sentences = False  # whether there has been a sentence
        self._last = ""

    def take(self, text: str, language: str | None) -> str:
        """Return the text without marks that follow another mark."""
        self._language = language
        if language is None:
            return text
        self._last = text.rstrip()[-1:] or self._last
        return "".join(character for character in text if self._keeps(character, END_MARKS[language]))

    def missing(self) -> str:
        """Return the full stop to append if the text does not end with a mark."""
        if self._language is None or not self._last:
            return ""
        ended = self._last in END_MARKS[self._language]
        return "" if ended else self.take(FULL_STOP[self._language], self._language)

    def _keeps(self, character: str, marks: str) -> bool:
        if character in marks:
            keep = not self._after_mark
            self._sentences = self._sentences or keep
            self._after_mark = self._quote_may_follow = True
            return keep
        if not (character in CLOSING_QUOTES and self._quote_may_follow and self._sentences):
            self._after_mark = False
        self._quote_may_follow = False
        return True
