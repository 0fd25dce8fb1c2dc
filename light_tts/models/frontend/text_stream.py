"""Converts text that arrives while it is spoken to ids."""

from __future__ import annotations

from light_tts.common.instructions import END_OF_PROMPT, MisplacedMark
from light_tts.common.speakable import is_speakable
from light_tts.models.frontend.normalized_stream import NormalizedStream, SentenceMarks
from light_tts.models.frontend.text import TextNormalizer
from light_tts.models.frontend.text_groups import Group
from light_tts.models.frontend.token_stream import TokenStream
from light_tts.models.frontend.tokenizer import TextTokenizer


class TextStream:
    """Returns the ids of one text as soon as later text cannot change them. They are the ids of the whole
    text as one part, however it is divided.

    With a `system` (see InputFormat), the text may begin with it and <|endofprompt|>, which are not spoken.
    An instruction must be in the prompt text, which is sent before the text arrives."""

    def __init__(self, normalizer: TextNormalizer, tokenizer: TextTokenizer, system: str = "") -> None:
        self._beginning = Beginning(system + END_OF_PROMPT if system else "")
        self._mark = tokenizer.token_id(END_OF_PROMPT) if system else None
        self._text = NormalizedStream(normalizer)
        self._marks = SentenceMarks()
        self._tokens = TokenStream(tokenizer)
        self._speakable = False

    def append(self, text: str) -> list[int]:
        """Return the ids that are final with this text. Raises MisplacedMark."""
        return self._ids(self._text.append(self._beginning.without(text)))

    def finish(self) -> list[int]:
        """Return the rest. A text with nothing to say has no ids at all. Raises MisplacedMark."""
        ids = self._ids(self._text.append(self._beginning.held) + self._text.finish())
        if not self._speakable:
            return []
        return ids + self._tokens.finish(self._marks.missing())

    def _ids(self, groups: list[Group]) -> list[int]:
        ids: list[int] = []
        for group in groups:
            self._speakable = self._speakable or is_speakable(group.text)
            ids += self._tokens.append(self._marks.take(group.text, group.language))
            if group.forced:
                ids += self._tokens.flush()
        if self._mark in ids:
            raise MisplacedMark(f"an instruction before {END_OF_PROMPT} belongs in the prompt text")
        return ids


class Beginning:
    """Drops `unspoken` from the beginning of a text that arrives in pieces. `held`: the text so far while it
    may become `unspoken`."""

    def __init__(self, unspoken: str) -> None:
        self._unspoken = unspoken
        self.held = ""

    def without(self, text: str) -> str:
        """Return the text that is spoken."""
        if not self._unspoken:
            return text
        text = self.held + text
        begun = self._unspoken.startswith(text)
        if begun and text != self._unspoken:
            self.held = text
            return ""
        rest = text.removeprefix(self._unspoken)
        self._unspoken = self.held = ""
        return rest
