"""Text that arrives bit by bit, made speakable as it comes."""

from __future__ import annotations

from light_tts.models.frontend.text import (
    CLOSING_QUOTES,
    END_MARKS,
    FULL_STOP,
    TextNormalizer,
    end_chinese,
    tidy_chinese,
)
from light_tts.models.frontend.text_groups import Group, TextGroups


class NormalizedStream:
    """Text as it will be spoken, of a text that arrives bit by bit; a blank at its end counts for nothing."""

    def __init__(self, normalizer: TextNormalizer, language: str = "en") -> None:
        self._normalizer = normalizer
        self._groups = TextGroups(language)
        self._chinese = ChineseTidier()

    def append(self, text: str) -> list[Group]:
        """What later text cannot change."""
        return [self._normalized(group) for group in self._groups.append(text)]

    def finish(self) -> list[Group]:
        """The rest."""
        rest = [self._normalized(group) for group in self._groups.finish()]
        tidied = self._chinese.finish()
        return [*rest, Group(tidied, "zh")] if tidied else rest

    def _normalized(self, group: Group) -> Group:
        text, chinese = self._normalizer.spell(group), self._chinese
        tidied = chinese.append(text) if group.language == "zh" else chinese.finish() + text
        return group._replace(text=tidied)


class ChineseTidier:
    """Chinese text without blanks and symbols that nobody reads, of text that arrives bit by bit."""

    _UNSETTLED = "- ，,、—（）【】`"  # until it is known what follows

    def __init__(self) -> None:
        self._before = ""  # the last character given away, as it was
        self._waiting = ""

    def append(self, text: str) -> str:
        """What later text cannot change."""
        text = self._waiting + text.replace("\n", "")
        settled = len(text.rstrip(self._UNSETTLED))
        self._waiting = text[settled:]
        return self._tidy(text[:settled])

    def finish(self) -> str:
        """The rest: here the Chinese text ends."""
        rest, self._waiting = self._waiting.rstrip(" "), ""
        return end_chinese(self._tidy(rest))

    def _tidy(self, text: str) -> str:
        before = self._before
        self._before = text[-1:] or before
        return tidy_chinese(text, before)


class SentenceMarks:
    """What `split_sentences` does to the marks of a text, of text that arrives bit by bit."""

    def __init__(self) -> None:
        self._language: str | None = None
        self._after_mark = True  # or at the begin
        self._quote_may_follow = False
        self._sentences = False  # there is one
        self._last = ""

    def take(self, text: str, language: str | None) -> str:
        """The text without marks that follow a mark."""
        self._language = language
        if language is None:
            return text
        self._last = text.rstrip()[-1:] or self._last
        return "".join(character for character in text if self._keeps(character, END_MARKS[language]))

    def missing(self) -> str:
        """The full stop, if the text has no mark at its end."""
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
