"""Jobs of the LLM stage, and their parts under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from light_tts.engine.llm.delivery import Delivery
from light_tts.engine.llm.sequence import Sequence
from light_tts.server.core.messages import Generate


@dataclass(eq=False)
class Speaking:
    """A part under way."""

    request: Generate
    sequence: Sequence
    delivery: Delivery
    arrived: float
    opened: bool = False  # the decode process knows of it

    @property
    def urgent(self) -> bool:
        """Whether a stream needs a step at once: not all tokens of its first chunk are being drawn, or it has
        ids that the device does not know."""
        sequence = self.sequence
        if not (self.request.stream and sequence.runnable):
            return False
        return not sequence.on_device or self.undrawn > 0

    @property
    def undrawn(self) -> int:
        """How many tokens that its first chunk waits for are not even being drawn; none where it is not
        positive."""
        return self.delivery.missing - self.sequence.ahead

    @property
    def breaks_silence(self) -> bool:
        """Whether what is handed on next is the first that the client will hear."""
        unheard = self.request.part == 0 and not self.request.progress.samples
        return unheard and self.delivery.missing > 0


@dataclass
class LLMJob:
    reply_to: str
    alone: bool = False  # its steps are taken without others
    decode: int | None = None  # its decode process, once it has one
    parts: dict[int, Speaking] = field(default_factory=dict)
