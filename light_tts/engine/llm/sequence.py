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

from dataclasses import dataclass, field

from light_tts.common.sampling_rule import GREEDY, SamplingRule
from light_tts.models.llm.speech_lm import SpeechIds

MAX_TOKENS_PER_TEXT_ID = 20


class SequenceError(ValueError):
    """The request cannot be served; the message, meant for the client, names the limit."""


@dataclass(frozen=True)
class PartRequest:
    """Everything that a sequence is created from except its text. `limit`: maximum number of ids fed to the
    model; `leading`: number of ids at the beginning of `prompt_text` that are instructions: bistream does not
    mix them with speech; `forced`: outputs of an earlier attempt; `min_outputs`, `max_outputs`: None: derived
    from the length of the text."""

    job: str
    part: int
    seed: int
    ids: SpeechIds
    limit: int
    prompt_text: list[int] = field(default_factory=list)
    prompt_speech: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    min_outputs: int | None = None
    max_outputs: int | None = None
    sampling: SamplingRule = GREEDY
    leading: int = 0


class Sequence:
    """Base class of one-shot and bistream sequences."""

    def __init__(self, request: PartRequest) -> None:
        self.job = request.job
        self.part = request.part
        self.sampling = request.sampling
        self.seed = (request.seed + 2**63) % 2**64 - 2**63  # wrapped to int64
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
        self._ids = request.ids
        self._limit = request.limit

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
        if text and not 0 <= min(text) <= max(text) < self._ids.text_vocab:
            raise SequenceError("a text id is not in the vocabulary of the model")
        if speech and not 0 <= min(speech) <= max(speech) < self._ids.speech_tokens:
            raise SequenceError("a token of the prompt is not a speech token of the model")
