"""Reads the attention of a finished part: when each word is spoken, and whether words were skipped or
repeated."""

from __future__ import annotations

import logging

import numpy as np

from light_tts.engine.llm.one_shot import OneShot
from light_tts.models.llm.alignment import times_of_words
from light_tts.models.llm.interface import Aligner
from light_tts.models.llm.misreading import Misreading, misreading
from light_tts.server.tts_llm.jobs import Speaking


class Reading:
    """`redraw`: whether parts with skipped or repeated words are drawn once more."""

    def __init__(self, aligner: Aligner, redraw: bool, log: logging.Logger) -> None:
        self._aligner = aligner
        self._redraw = redraw
        self._log = log

    def times(self, speaking: Speaking) -> list[int]:
        """Return the word times of a finished part as in SpeechTokens, or an empty list if they were not
        requested."""
        if not speaking.request.options.word_times:
            return []
        share = self._share(speaking)
        return [] if share is None else times_of_words(share)

    def wrong(self, speaking: Speaking) -> Misreading | None:
        """Return what is wrong with a finished part that may be drawn again, otherwise None. A part may be
        drawn again once, if none of it has been sent and the client did not set its length."""
        options, sequence = speaking.request.options, speaking.sequence
        if not self._redraw or speaking.next_seed_tried or not speaking.in_hand:
            return None
        if options.min_new_tokens is not None or len(sequence.outputs) == options.max_new_tokens:
            return None
        share = self._share(speaking)
        return None if share is None else misreading(share)

    def _share(self, speaking: Speaking) -> np.ndarray | None:
        """Return what `Aligner` returns, or None if the words are not known or the memory is too small."""
        request, sequence = speaking.request, speaking.sequence
        if not request.words:
            return None
        if speaking.share is None:
            # words are only counted for text that is complete from the start
            assert isinstance(sequence, OneShot)
            inputs = sequence.spoken_inputs
            spoken = range(sequence.given, len(inputs))
            try:
                speaking.share = self._aligner(inputs, sequence.text, spoken, request.words)
            except RuntimeError as error:  # out of memory: continue without
                self._log.warning("%s: its attention cannot be read: %s", request.job, error)
        return speaking.share
