"""Text that arrives while it is spoken, as ids."""

from __future__ import annotations

from light_tts.common.speakable import is_speakable
from light_tts.models.frontend.normalized_stream import NormalizedStream, SentenceMarks
from light_tts.models.frontend.text import TextNormalizer
from light_tts.models.frontend.text_groups import Group
from light_tts.models.frontend.token_stream import TokenStream
from light_tts.models.frontend.tokenizer import TextTokenizer


class TextStream:
    """The ids of one text, given as soon as later text cannot change them: those that the whole text would
    give as one part, however it is cut."""

    def __init__(self, normalizer: TextNormalizer, tokenizer: TextTokenizer) -> None:
        self._text = NormalizedStream(normalizer)
        self._marks = SentenceMarks()
        self._tokens = TokenStream(tokenizer)
        self._speakable = False

    def append(self, text: str) -> list[int]:
        """The ids that are certain with this text."""
        return self._ids(self._text.append(text))

    def finish(self) -> list[int]:
        """The rest. There are none at all of a text that has nothing to say."""
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
