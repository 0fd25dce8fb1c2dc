"""When each word of a part is spoken, for requests that want to know."""

from __future__ import annotations

import logging

import numpy as np

from light_tts.models.llm.interface import Aligner
from light_tts.models.llm.speech_lm import SpeechIds
from light_tts.server.tts_llm.jobs import Speaking


class WordTimes:
    def __init__(self, aligner: Aligner, ids: SpeechIds, log: logging.Logger) -> None:
        self._aligner = aligner
        self._ids = ids
        self._log = log

    def of(self, speaking: Speaking) -> list[int]:
        """Of a part that has been drawn, see SpeechTokens; empty where nobody asked."""
        request, sequence = speaking.request, speaking.sequence
        if not request.words:
            return []
        first = 1 + len(request.prompt_text_ids)  # behind the start of the sequence
        text = range(first, first + len(request.text_ids))
        spoken = text.stop + 1 + len(request.prompt_speech_token.array(np.int32))
        inputs = [*sequence.inputs[:spoken], *map(self._ids.speech, sequence.outputs)]
        try:
            return self._aligner(inputs, text, range(spoken, len(inputs)), request.words)
        except RuntimeError as error:  # no memory: the speech goes on without
            self._log.warning("%s: no times of words: %s", request.job, error)
            return []
