"""Jobs of the encode stage."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from light_tts.models.frontend.prompt_text import PromptText
from light_tts.models.frontend.text_stream import TextStream
from light_tts.server.core import messages
from light_tts.server.core.prompt_cache import CachedPrompt

STAGE = "encode"
LONG_TEXT = 500  # texts of this many characters or more may be slow; their jobs do not delay the others


class TextError(Exception):
    """The request cannot be served; the message is for the client."""


class PromptGone(Exception):
    """The HTTP worker relied on cached features that have been evicted; it can send the recording."""


@dataclass
class EncodeJob:
    """One job from its arrival to its release. For a bistream job: `stream` encodes its text; `encodings` are
    the pieces in progress, oldest first; `unsent_ids` are ids that arrived before its Generate could be sent;
    `words`, if word times were requested: the words of the ids that have been sent, and the number of ids of
    each; `last_word`: the ids of the last one, which may still grow; `text_sent`: the end of its text has
    been forwarded."""

    request: messages.Synthesize
    arrived: float
    started: float = 0.0
    texts: Future[tuple[list[list[int]], PromptText]] | None = None
    prompt: Future[CachedPrompt] | None = None
    stream: TextStream | None = None
    encodings: deque[Future[list[int]]] = field(default_factory=deque)
    unsent_ids: list[int] = field(default_factory=list)
    words: list[tuple[str, int]] = field(default_factory=list)
    last_word: list[int] = field(default_factory=list)
    text_finished: bool = False
    text_sent: bool = False
    sent: bool = False
    forgotten: bool = False

    @property
    def name(self) -> str:
        return self.request.job

    @property
    def long(self) -> bool:
        return len(self.request.text) + len(self.request.prompt.text) > LONG_TEXT

    @property
    def alone(self) -> bool:
        return STAGE in self.request.alone_in

    @property
    def encoded(self) -> bool:
        """Whether everything is available that its Generate needs."""
        return all(future is not None and future.done() for future in (self.texts, self.prompt))
