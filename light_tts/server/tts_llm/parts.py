"""Turns a `Generate` message into a sequence for the scheduler and a delivery for its tokens."""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np

from light_tts.common.sampling_rule import SamplingRule
from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.delivery import Delivery
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.sequence import PartRequest, Sequence, SequenceError
from light_tts.engine.speech.chunk_planner import ChunkPlanner, largest_hop
from light_tts.models.llm.speech_lm import SpeechIds
from light_tts.models.numbers import ModelNumbers
from light_tts.server.core.messages import Generate, SpeechOptions
from light_tts.server.core.settings import Settings
from light_tts.server.tts_llm.jobs import Speaking

_SAMPLING = [entry.name for entry in fields(SamplingRule)]


def sampling_rule(options: SpeechOptions, default: SamplingRule) -> SamplingRule:
    """Return the client's sampling options, with the checkpoint's defaults for the rest."""
    chosen = {name: getattr(options, name) for name in _SAMPLING}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return replace(default, **chosen) if chosen else default


class PartFactory:
    """Creates the parts of one model. `limit`: maximum number of input ids."""

    def __init__(self, numbers: ModelNumbers, ids: SpeechIds, settings: Settings, limit: int) -> None:
        self._numbers = numbers
        self._ids = ids
        self._limit = limit
        self._longest = settings.max_part_tokens
        self._max_hop = largest_hop(numbers.chunk_tokens, settings.chunks_grow)
        self._first_hop = settings.first_hop
        self.token_seconds = numbers.samples_per_token / numbers.sample_rate  # audio of a speech token

    def make(self, request: Generate) -> Speaking:
        """Create a part. Raises SequenceError if the request cannot fit."""
        return Speaking(request, self._sequence(request), self.delivery(request), time.monotonic())

    def _sequence(self, request: Generate) -> Sequence:
        part = PartRequest(
            job=request.job,
            part=request.part,
            seed=request.options.seed,
            ids=self._ids,
            limit=self._limit,
            prompt_text=request.prompt_text_ids,
            prompt_speech=request.prompt_speech_token.array(np.int32).tolist(),
            forced=request.progress.tokens,
            min_outputs=request.options.min_new_tokens,
            max_outputs=request.options.max_new_tokens,
            sampling=sampling_rule(request.options, self._numbers.sampling),
            leading=request.leading_ids,
        )
        if not request.bistream:
            return OneShot(part, request.text_ids, self._longest)
        sequence = Bistream(part, self._numbers.mix_ratio)
        sequence.append_text(request.text_ids)
        if sequence.error:
            raise SequenceError(sequence.error)
        return sequence

    def delivery(self, request: Generate) -> Delivery:
        """Return the delivery of a part of which no token has been drawn yet."""
        planner = None
        if request.stream:
            numbers = self._numbers
            planner = ChunkPlanner(
                request.flow_prompt_tokens,
                numbers.chunk_tokens,
                numbers.lookahead_tokens,
                self._max_hop,
                self._first_hop,
            )
        return Delivery(planner, self._ids.speech_tokens)
