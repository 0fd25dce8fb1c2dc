"""A part whose text is known from the beginning."""

from __future__ import annotations

from light_tts.common.row_state import ALLOWED, HELD
from light_tts.engine.llm.sequence import MAX_TOKENS_PER_TEXT_ID, PartRequest, Sequence, SequenceError

MIN_TOKENS_PER_TEXT_ID = 2


class OneShot(Sequence):
    """All text is known: sos, prompt text and text, task, prompt speech, then the generated tokens."""

    max_outputs: int  # known from the beginning

    def __init__(self, request: PartRequest, text: list[int], longest: int | None = None) -> None:
        """`longest`: maximum number of outputs, whatever the request says. Raises SequenceError if it cannot
        fit."""
        super().__init__(request)
        ids, limit = request.ids, request.limit
        min_outputs, max_outputs = request.min_outputs, request.max_outputs
        self._check(request.prompt_text + text, request.prompt_speech + request.forced)
        if not text:
            raise SequenceError("the text is empty")
        self.inputs = [ids.sos, *request.prompt_text, *text, ids.task, *ids.spoken(request.prompt_speech)]
        if max_outputs is None:
            max_outputs = max(MAX_TOKENS_PER_TEXT_ID * len(text), min_outputs or 0)
        if longest is not None:
            max_outputs = min(max_outputs, longest)
        if min_outputs is None:
            min_outputs = min(MIN_TOKENS_PER_TEXT_ID * len(text), max_outputs)
        self.min_outputs = min_outputs
        self.max_outputs = min(max_outputs, limit - len(self.inputs))
        if self.max_outputs < max(1, self.min_outputs):
            raise SequenceError(
                f"prompt and text use {len(self.inputs)} tokens, which leaves {max(0, self.max_outputs)} "
                f"for speech that needs at least {max(1, self.min_outputs)}: the limit is {limit} "
                f"(--max_req_total_len), and {max_outputs} for the speech alone"
            )
        self.text = range(
            1 + len(request.prompt_text), 1 + len(request.prompt_text) + len(text)
        )  # in `inputs`
        self.given = len(self.inputs)  # ids before the generated ones
        for token in request.forced:
            self.accept(token)

    @property
    def spoken_inputs(self) -> list[int]:
        """The given ids and all outputs, as unified ids. `inputs` may lack the last output."""
        return [*self.inputs[: self.given], *self._ids.spoken(self.outputs)]

    def retry_with_next_seed(self) -> None:
        """Return to the beginning, to be drawn with the next seed. Its slots must have been released."""
        del self.inputs[self.given :]
        self.outputs.clear()
        self.seed = (self.seed + 1) % 2**32
        self.finished = False

    @property
    def bans(self) -> list[int]:
        special = self._ids.special
        return [HELD if i in special.held else ALLOWED for i in range(special.count)]

    def accept(self, token: int) -> None:
        if token in self._ids.stop:
            self.finished = True
        elif not self.finished:
            self._speak(token)

    def accept_all(self, tokens: list[int]) -> int:
        if len(self.outputs) + len(tokens) >= self.max_outputs or max(tokens) >= self._ids.speech_tokens:
            return super().accept_all(tokens)
        self.ahead -= len(tokens)
        self.outputs += tokens
        self.inputs += self._ids.spoken(tokens)
        return len(tokens)
