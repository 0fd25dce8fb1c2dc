"""Word times of a part, for requests that ask for them."""

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
        """Return the word times of a finished part as in SpeechTokens, or an empty list if they were not
        requested."""
        request, sequence = speaking.request, speaking.sequence
        if not request.words:
            return []
        first = 1 + len(request.prompt_text_ids)  # after the start-of-sequence token
        text = range(first, first + len(request.text_ids))
        spoken = text.stop + 1 + len(request.prompt_speech_token.array(np.int32))
        inputs = [*sequence.inputs[:spoken], *map(self._ids.speech, sequence.outputs)]
        try:
            return self._aligner(inputs, text, range(spoken, len(inputs)), request.words)
        except RuntimeError as error:  # out of memory: continue without word times
            self._log.warning("%s: no word times: %s", request.job, error)
            return []
