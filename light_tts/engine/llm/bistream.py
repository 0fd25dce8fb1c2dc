"""A part whose text arrives in pieces."""

from __future__ import annotations

from collections import deque

from light_tts.common.row_state import ALLOWED, BANNED, HELD
from light_tts.engine.llm.sequence import MAX_TOKENS_PER_TEXT_ID, PartRequest, Sequence, SequenceError


class Bistream(Sequence):
    """Text arrives while speech is generated: blocks of `mix[0]` text ids and `mix[1]` speech tokens.

    A block ends with the fill id, and the next one starts once there is enough text. Text is consumed id by
    id, so the result does not depend on how it was split. When the text is complete, its remainder is
    followed by the task id and the rest of the speech. The leading ids of the prompt's text are fed before
    the first block.
    """

    def __init__(self, request: PartRequest, mix: tuple[int, int]) -> None:
        """Raises SequenceError if the request cannot fit."""
        super().__init__(request)
        ids, prompt_text, prompt_speech = request.ids, request.prompt_text, request.prompt_speech
        self._check(prompt_text, prompt_speech + [token for token in request.forced if token != ids.fill])
        self.min_outputs = request.min_outputs or 0
        self.max_outputs = request.max_outputs
        self._text_per_block, self._speech_per_block = mix
        self._forced = request.forced
        self._arrived: deque[int] = deque()  # text not processed yet
        self._leading = request.leading
        self._text = prompt_text[request.leading :]  # text waiting for a block
        self._text_ids = 0  # number of ids that have arrived
        self._prompt_ids = len(prompt_text)
        self._text_ended = False
        self._prompt_speech = ids.spoken(prompt_speech)
        self._waiting = True  # waiting for text
        self._last = False  # in the section after the end of the text
        self._group: list[int] = []  # the latest ids fed together
        self._text_at: list[int] = []  # positions in `inputs` of all text ids, including the prompt's
        self.speech: list[int] = []  # positions in `inputs` of the outputs without fill ids
        self._give(prompt_text[: request.leading], before=[ids.sos])
        block = self._speech_per_block
        self._next_fill = block - len(prompt_speech) % block

    @property
    def text(self) -> list[int]:
        """Positions in `inputs` of the text ids to speak."""
        return self._text_at[self._prompt_ids :]

    @property
    def ready(self) -> bool:
        return not self._waiting and super().ready

    @property
    def bans(self) -> list[int]:
        special = self._ids.special
        bans = [BANNED] * special.count
        if self._last:
            bans[special.eos] = HELD
        else:
            bans[special.fill] = ALLOWED
        return bans

    @property
    def steps_until_host(self) -> int:
        straight_on = super().steps_until_host
        return straight_on if self._last else min(straight_on, self._next_fill - len(self.outputs) + 1)

    def append_text(self, text: list[int]) -> None:
        """Add text. Raises SequenceError for ids outside the vocabulary."""
        self._check(text, [])
        self._arrived.extend(text)
        self._text_ids += len(text)
        self._advance()

    def finish_text(self) -> None:
        """End the text. Raises SequenceError if there was none."""
        if not self._text_ids:
            raise SequenceError("the text is empty")
        self._text_ended = True
        if self.max_outputs is None:
            # The reference has no limit here: a model that never ends would speak for minutes.
            spoken = self._prompt_ids - self._leading + self._text_ids
            self.max_outputs = MAX_TOKENS_PER_TEXT_ID * spoken
        self._advance()

    def accept(self, token: int) -> None:
        self._accept(token)
        self._advance()

    def _advance(self) -> None:
        """Proceed as far as text and forced tokens allow."""
        while not self.finished:
            if self._waiting and self._arrived:
                self._take_text(self._arrived.popleft())
            elif self._waiting and self._text_ended:
                self._begin_last()
            elif not self._waiting and len(self.outputs) < len(self._forced):
                self._accept(self._forced[len(self.outputs)])
            else:
                return

    def _take_text(self, text_id: int) -> None:
        """Process one text id like the reference's loop: prompt blocks while there is text, then one
        block.
        """
        size = self._text_per_block
        self._text.append(text_id)
        while self._prompt_speech and len(self._text) >= size:
            speech = self._prompt_speech[: self._speech_per_block]
            del self._prompt_speech[: self._speech_per_block]
            self._give(self._take_block(), then=speech, anew=False)
        if self._prompt_speech:
            return
        if self.outputs or len(self.inputs) == 1 + self._leading:
            if len(self._text) < size:
                return
            self._give(self._take_block(), anew=bool(self.outputs))
        self._waiting = False

    def _take_block(self) -> list[int]:
        block = self._text[: self._text_per_block]
        del self._text[: self._text_per_block]
        return block

    def _begin_last(self) -> None:
        """Start the last section. Like the reference, feed the latest group again if it has already been fed.
        If the text was too short for all of the prompt's speech, the rest of that speech follows the task id,
        as in training; the reference drops it and may then repeat the end of the prompt's text."""
        again = self._group if self.outputs else []
        self._waiting, self._last = False, True
        rest = [self._ids.task, *self._prompt_speech]
        self._give(self._text, before=again, then=rest, anew=bool(self.outputs))
        self._text, self._prompt_speech = [], []

    def _give(
        self,
        text: list[int],
        before: list[int] | None = None,
        then: list[int] | None = None,
        anew: bool = True,
    ) -> None:
        """Feed text ids to the model, with the ids `before` them and `then` after them. `anew`: the ids fed
        earlier have been processed already."""
        before = before or []
        group = before + text + (then or [])
        begin = len(self.inputs) + len(before)
        if len(self.inputs) + len(group) > self._limit:
            self._reach_limit()
            return
        self.inputs += group
        self._text_at += range(begin, begin + len(text))
        self._group = group if anew else self._group + group

    def _accept(self, token: int) -> None:
        if not self._last and len(self.outputs) == self._next_fill:
            token = self._ids.fill
        if token == self._ids.fill and not self._last:
            self._next_fill = len(self.outputs) + self._speech_per_block + 1
            self.outputs.append(token)
            self._waiting = True
            self.recall(len(self.inputs))  # text comes next
        elif token in self._ids.stop:
            self.finished = True
        else:
            self.speech.append(len(self.inputs))
            self._speak(token)
            self._group = self.inputs[-1:]

    def _reach_limit(self) -> None:
        self.finished = True
        if not self._last:
            self.error = (
                f"the text and its speech exceed the limit of {self._limit} tokens (--max_req_total_len)"
            )
