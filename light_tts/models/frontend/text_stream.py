"""Converts text that arrives while it is spoken to ids."""

from __future__ import annotations

from light_tts.common.speakable import is_speakable
from light_tts.models.frontend.normalized_stream import NormalizedStream, SentenceMarks
from light_tts.models.frontend.text import TextNormalizer
from light_tts.models.frontend.text_groups import Group
from light_tts.models.frontend.token_stream import TokenStream
from light_tts.models.frontend.tokenizer import TextTokenizer


class TextStream:
    """Returns the ids of one text as soon as later text cannot change them. They are the ids of the whole
    text as one part, however it is divided."""

    def __init__(self, normalizer: TextNormalizer, tokenizer: TextTokenizer) -> None:
        self._text = NormalizedStream(normalizer)
        self._marks = SentenceMarks()
        self._tokens = TokenStream(tokenizer)
        self._speakable = False

    def append(self, text: str) -> list[int]:
        """Return the ids that are final with this text."""
        return self._ids(self._text.append(text))

    def finish(self) -> list[int]:
        """Return the rest. A text with nothing to say has no ids at all."""
        ids = self._ids(self._text.finish())
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
        return ids
