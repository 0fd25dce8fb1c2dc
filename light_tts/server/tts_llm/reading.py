"""Reads the attention of a finished part: when each word is spoken, and whether words were skipped or
repeated."""

from __future__ import annotations

import logging

import numpy as np

from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.one_shot import OneShot
from light_tts.models.llm.alignment import times_of_words
from light_tts.models.llm.interface import Aligner, Positions
from light_tts.models.llm.misreading import Misreading, misreading
from light_tts.server.tts_llm.jobs import Speaking


class Reading:
    """`redraw`: whether parts with skipped or repeated words are drawn once more."""

    def __init__(self, aligner: Aligner, redraw: bool, log: logging.Logger) -> None:
        self._aligner = aligner
        self._redraw = redraw
        self._log = log

    def times(self, speaking: Speaking) -> list[int]:
        """Return the times of the words spoken so far as in SpeechTokens, or an empty list if they were not
        requested. Text that was complete from the start has times only when its part is finished."""
        ended = speaking.sequence.finished
        if not speaking.request.options.word_times or not (ended or speaking.request.bistream):
            return []
        share = self._share(speaking)
        return [] if share is None else times_of_words(share, ended)

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
        sequence, words = speaking.sequence, speaking.words
        if not words:
            return None
        if isinstance(sequence, Bistream):
            text = sequence.text
            words = words[: np.searchsorted(np.cumsum(words), len(text), side="right")]  # those fed already
            return self._read(speaking, sequence.inputs, text[: sum(words)], sequence.speech, words)
        if speaking.share is None:
            assert isinstance(sequence, OneShot)
            inputs = sequence.spoken_inputs
            spoken = range(sequence.given, len(inputs))
            speaking.share = self._read(speaking, inputs, sequence.text, spoken, words)
        return speaking.share

    def _read(
        self, speaking: Speaking, inputs: list[int], text: Positions, speech: Positions, words: list[int]
    ) -> np.ndarray | None:
        try:
            return self._aligner(inputs, text, speech, words)
        except RuntimeError as error:  # no memory: the speech goes on without
            self._log.warning("%s: its attention cannot be read: %s", speaking.request.job, error)
            return None
