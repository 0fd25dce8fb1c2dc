"""Decides when a part's tokens are sent to the decode stage."""

from __future__ import annotations

from light_tts.engine.speech.chunk_planner import ChunkPlanner


class Delivery:
    """Splits a part's outputs into messages. `planner`: where a streamed part is cut; None: everything at the
    end. `speech_tokens`: ids from here on (bistream's fill id) are sent but produce no audio, so the planner
    does not count them."""

    def __init__(self, planner: ChunkPlanner | None, speech_tokens: int) -> None:
        self._planner = planner
        self._speech_tokens = speech_tokens
        self._counted = 0  # number of outputs processed
        self._spoken = 0  # number of these that produce audio
        self._sent = 0

    @property
    def missing(self) -> int:
        """Number of tokens still missing for the part's first chunk; 0 if it has been sent or the part is not
        streamed."""
        return 0 if self._planner is None or self._sent else self._planner.needed - self._spoken

    def at_once(self, outputs: list[int]) -> bool:
        """Whether a part that ends with these outputs is sent and spoken as one piece."""
        return self._planner is None or (not self._sent and len(outputs) < self._planner.needed)

    def take(self, outputs: list[int], finished: bool) -> list[int] | None:
        """Return the outputs to send now, given all `outputs` so far, or None if there is nothing to send
        yet."""
        self._spoken += sum(token < self._speech_tokens for token in outputs[self._counted :])
        self._counted = len(outputs)
        due = finished
        while self._planner is not None and self._planner.next_chunk(self._spoken, finished):
            due = True
        if not due:
            return None
        tokens, self._sent = outputs[self._sent :], len(outputs)
        return tokens
