"""State machine of one part in the language model, without tensors.

A sequence holds the ids that go into the model (`inputs`, of which the first `cached` are in the KV pool) and
the ids that came out (`outputs`). The engine feeds `inputs[cached:]`, samples a token from the last row and
passes it to `accept`. An earlier state can be restored from its outputs alone: they are given as `forced` and
replace samples.

Between two host interventions the device may sample several tokens in a row and feed each back itself
(`on_device`). `ahead` of these have not been accepted yet; they are in the pool, so they are counted in
`cached` but are not in `inputs`.
"""

from __future__ import annotations

from collections import deque

from light_tts.common.row_state import ALLOWED, BANNED, HELD
from light_tts.common.sampling_rule import GREEDY, SamplingRule
from light_tts.models.llm.speech_lm import SpeechIds

MIN_TOKENS_PER_TEXT_ID = 2
MAX_TOKENS_PER_TEXT_ID = 20


def _held(ids: SpeechIds) -> list[int]:
    """Return ALLOWED or HELD for each special id of the model."""
    special = ids.special
    return [HELD if i in special.held else ALLOWED for i in range(special.count)]


class SequenceError(ValueError):
    """The request cannot be served; the message, meant for the client, names the limit."""


class Sequence:
    """Base class of one-shot and bistream sequences. `limit`: maximum number of ids fed to the model."""

    def __init__(
        self, job: str, part: int, seed: int, ids: SpeechIds, limit: int, sampling: SamplingRule
    ) -> None:
        self.job = job
        self.part = part
        self.sampling = sampling
        self.seed = (seed + 2**63) % 2**64 - 2**63  # wrapped to int64
        self.inputs: list[int] = []  # unified ids
        self.outputs: list[int] = []  # speech ids, including bistream fill ids, excluding stop ids
        self.cached = 0
        self.row: int | None = None  # row in the slot table
        self.on_device = False  # the next id is the last sampled token, which the device knows
        self.ahead = 0  # tokens sampled or being sampled but not accepted yet
        self.epoch = 0  # samples launched in an earlier epoch are invalid
        self.arrival = 0  # set by the scheduler
        self.finished = False
        self.error: str | None = None  # why it ended prematurely
        self.min_outputs = 0
        self.max_outputs: int | None = None  # None: not known yet
        self._ids = ids
        self._limit = limit

    @property
    def pending(self) -> int:
        """Number of ids still to be fed; negative by the number the device has fed by itself."""
        return len(self.inputs) - self.cached

    @property
    def ready(self) -> bool:
        """Whether a step would advance it, or one in progress will."""
        return not self.finished and self.pending + self.ahead > 0

    @property
    def runnable(self) -> bool:
        """Whether a step may be launched now."""
        return self.ready and (not self.on_device or self.free_steps > 0)

    @property
    def free_steps(self) -> int:
        """Maximum number of tokens that may be sampled before the host must look at them."""
        return self.steps_until_host - self.ahead

    @property
    def steps_until_host(self) -> int:
        """Upper bound on the number of tokens that the device may sample before the host must intervene."""
        room = self._limit - len(self.inputs) + 1
        return room if self.max_outputs is None else min(room, max(1, self.max_outputs - len(self.outputs)))

    @property
    def longest_rest(self) -> int:
        """Maximum number of tokens that may still be produced."""
        room = self._limit - len(self.inputs)
        return room if self.max_outputs is None else min(room, self.max_outputs - len(self.outputs))

    @property
    def bans(self) -> list[int]:
        """ALLOWED, BANNED or HELD for each special speech id: whether it may be sampled before the host feeds
        other ids."""
        raise NotImplementedError

    def latest(self, window: int) -> list[int]:
        """Return the last `window` outputs."""
        return self.outputs[-window:]

    def accept(self, token: int) -> None:
        """Accept the token sampled after `inputs`."""
        raise NotImplementedError

    def accept_all(self, tokens: list[int]) -> int:
        """Accept the tokens that the device sampled consecutively, up to the end or to where it should have
        been fed another id; the rest is discarded. Returns the number accepted."""
        self.ahead -= len(tokens)
        for taken, token in enumerate(tokens, 1):
            self.accept(token)
            if self.finished or not self.on_device:
                self.recall(len(self.inputs))
                return taken
        return len(tokens)

    def recall(self, cached: int) -> None:
        """Return control to the host: tokens sampled but not accepted are discarded, and at most the first
        `cached` ids remain in the pool."""
        self.cached = min(self.cached, cached)
        self.on_device = False
        self.ahead = 0
        self.epoch += 1

    def _speak(self, token: int) -> None:
        """Append a speech token to the outputs and feed it back, unless it is the last."""
        self.outputs.append(token)
        if self.max_outputs is not None and len(self.outputs) >= self.max_outputs:
            self.finished = True
        elif len(self.inputs) == self._limit:
            self._reach_limit()
        else:
            self.inputs.append(self._ids.speech(token))

    def _reach_limit(self) -> None:
        self.finished = True

    def _check(self, text: list[int], speech: list[int]) -> None:
        if not all(0 <= i < self._ids.text_vocab for i in text):
            raise SequenceError("a text id is not in the vocabulary of the model")
        if not all(0 <= i < self._ids.speech_tokens for i in speech):
            raise SequenceError("a token of the prompt is not a speech token of the model")


class OneShot(Sequence):
    """All text is known: sos, prompt text and text, task, prompt speech, then the generated tokens."""

    def __init__(
        self,
        job: str,
        part: int,
        seed: int,
        ids: SpeechIds,
        limit: int,
        prompt_text: list[int],
        text: list[int],
        prompt_speech: list[int],
        forced: list[int],
        min_outputs: int | None = None,
        max_outputs: int | None = None,
        sampling: SamplingRule = GREEDY,
        longest: int | None = None,
    ) -> None:
        """`longest`: maximum number of outputs, whatever `max_outputs` says. Raises SequenceError if the
        request cannot fit."""
        super().__init__(job, part, seed, ids, limit, sampling)
        self._check(prompt_text + text, prompt_speech + forced)
        if not text:
            raise SequenceError("the text is empty")
        self.inputs = [ids.sos, *prompt_text, *text, ids.task, *map(ids.speech, prompt_speech)]
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
        for token in forced:
            self.accept(token)

    @property
    def bans(self) -> list[int]:
        return _held(self._ids)

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
        self.inputs += map(self._ids.speech, tokens)
        return len(tokens)


class Bistream(Sequence):
    """Text arrives while speech is generated: blocks of `mix[0]` text ids and `mix[1]` speech tokens.

    A block ends with the fill id, and the next one starts once there is enough text. Text is consumed id by
    id, so the result does not depend on how it was split. When the text is complete, its remainder is
    followed by the task id and the rest of the speech.
    """

    def __init__(
        self,
        job: str,
        part: int,
        seed: int,
        ids: SpeechIds,
        limit: int,
        prompt_text: list[int],
        prompt_speech: list[int],
        forced: list[int],
        mix: tuple[int, int],
        min_outputs: int | None = None,
        max_outputs: int | None = None,
        sampling: SamplingRule = GREEDY,
    ) -> None:
        """Raises SequenceError if the request cannot fit."""
        super().__init__(job, part, seed, ids, limit, sampling)
        self._check(prompt_text, prompt_speech + [token for token in forced if token != ids.fill])
        self.min_outputs = min_outputs or 0
        self.max_outputs = max_outputs
        self._text_per_block, self._speech_per_block = mix
        self._forced = forced
        self._arrived: deque[int] = deque()  # text not processed yet
        self._text = list(prompt_text)  # text waiting for a block
        self._text_ids = 0  # number of ids that have arrived
        self._prompt_ids = len(prompt_text)
        self._text_ended = False
        self._prompt_speech = [ids.speech(token) for token in prompt_speech]
        self._waiting = True  # waiting for text
        self._last = False  # in the section after the end of the text
        self._group: list[int] = []  # the latest ids fed together
        self._give([ids.sos])
        block = self._speech_per_block
        self._next_fill = block - len(prompt_speech) % block

    @property
    def ready(self) -> bool:
        return not self._waiting and super().ready

    @property
    def bans(self) -> list[int]:
        special = self._ids.special
        allowed = special.eos if self._last else special.fill
        bans = [BANNED] * special.count
        bans[allowed] = _held(self._ids)[allowed]
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
            self.max_outputs = MAX_TOKENS_PER_TEXT_ID * (self._prompt_ids + self._text_ids)
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
            self._give(self._take_block() + speech, anew=False)
        if self._prompt_speech:
            return
        if self.outputs or len(self.inputs) == 1:
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
        self._give(again + self._text + [self._ids.task, *self._prompt_speech], anew=bool(self.outputs))
        self._text, self._prompt_speech = [], []

    def _give(self, group: list[int], anew: bool = True) -> None:
        """Feed ids to the model. `anew`: the ids before them have been fed already."""
        if len(self.inputs) + len(group) > self._limit:
            self._reach_limit()
            return
        self.inputs += group
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
            self._speak(token)
            self._group = self.inputs[-1:]

    def _reach_limit(self) -> None:
        self.finished = True
        if not self._last:
            self.error = (
                f"the text and its speech exceed the limit of {self._limit} tokens (--max_req_total_len)"
            )
