"""Jobs of the LLM stage and their active parts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from light_tts.engine.llm.delivery import Delivery
from light_tts.engine.llm.sequence import Sequence
from light_tts.server.core.messages import Generate


@dataclass(eq=False)
class Speaking:
    """A part being generated."""

    request: Generate
    sequence: Sequence
    delivery: Delivery
    arrived: float
    admitted: float = 0.0
    opened: bool = False  # OpenSpeech has been sent to the decode process
    next_seed_tried: bool = False  # with the next seed, because the first draw skipped or repeated words
    share: np.ndarray | None = None  # of the attention, see Aligner, once it has been computed
    words: list[int] = field(init=False)  # number of text ids of each word, see Generate

    def __post_init__(self) -> None:
        self.words = self.request.words

    @property
    def urgent(self) -> bool:
        """Whether a stream needs a step now: some tokens of its first chunk are not being sampled yet, or it
        has ids that the device does not know."""
        sequence = self.sequence
        if not (self.request.stream and sequence.runnable):
            return False
        return not sequence.on_device or self.unsampled > 0

    @property
    def unsampled(self) -> int:
        """Number of tokens of its first chunk that are not being sampled yet; 0 or negative if none."""
        return self.delivery.missing - self.sequence.ahead

    @property
    def clock(self) -> list[float]:
        """When it arrived, was admitted and was finished (now), as in SpeechTokens."""
        return [self.arrived, self.admitted, time.monotonic()]

    @property
    def in_hand(self) -> bool:
        """Whether it is finished, none of it has been sent, and it will be sent and spoken as one piece."""
        unsent = not self.request.bistream and not self.request.progress.tokens
        return unsent and self.sequence.finished and self.delivery.at_once(self.sequence.outputs)

    @property
    def is_first_audio(self) -> bool:
        """Whether the next tokens sent produce the first audio for the client."""
        unheard = self.request.part == 0 and not self.request.progress.samples
        return unheard and self.delivery.missing > 0


@dataclass
class LLMJob:
    reply_to: str
    alone: bool = False  # its steps run without other jobs
    decode: int | None = None  # its decode process, once assigned
    dry_at: float = 0.0  # when its client runs out of audio if all tokens sent are spoken at once
    parts: dict[int, Speaking] = field(default_factory=dict)

    def sent(self, seconds: float) -> None:
        """Record that tokens for this much audio were sent."""
        now = time.monotonic()
        self.dry_at = max(self.dry_at, now) + seconds
