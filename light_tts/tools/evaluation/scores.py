"""Computes the measures of each take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from light_tts.tools.evaluation import words
from light_tts.tools.evaluation.endings import is_cut_off, length_ratio, ran_away
from light_tts.tools.evaluation.mos import naturalness
from light_tts.tools.evaluation.recogniser import transcribe
from light_tts.tools.evaluation.similarity import embed, own_and_best_other
from light_tts.tools.evaluation.sound import read_sound
from light_tts.tools.evaluation.takes import Take


@dataclass
class Score:
    """The measures of one take; None if not measured. `heard`: the recognised text; `length_ratio`: length of
    the speech divided by the expected one; `at_limit`: the speech reached the server's length limit;
    `similarity`, `other`: to its own prompt and to the most similar prompt of another voice."""

    text: str
    voice: str
    error: str = ""
    seconds: float | None = None
    heard: str | None = None
    word_errors: int | None = None
    words: int | None = None
    character_errors: int | None = None
    characters: int | None = None
    similarity: float | None = None
    other: float | None = None
    mos: float | None = None
    length_ratio: float | None = None
    cut_off: bool = False
    ran_away: bool = False
    at_limit: bool = False
    repeats: int | None = None
    rtf: float | None = None
    first_audio: float | None = None


class Scorer:
    """Measures takes one by one. `measures`: of wer, similarity, mos; lengths and times are always
    included.
    """

    def __init__(self, measures: Collection[str]) -> None:
        self._measures = measures
        self._embeddings: dict[Path, np.ndarray | None] = {}

    def score_all(self, takes: Sequence[Take], done: Callable[[Score], None]) -> list[Score]:
        """Score all takes; `done` is called with each score."""
        prompts = self._prompts(takes) if "similarity" in self._measures else {}
        found = []
        for take in takes:
            found.append(self._score(take, prompts))
            done(found[-1])
        return found

    def _prompts(self, takes: Sequence[Take]) -> dict[str, list[np.ndarray]]:
        """Return the embeddings of all prompts of each voice."""
        files = {(take.line.voice, take.line.prompt_wav) for take in takes if take.line.prompt_wav}
        found: dict[str, list[np.ndarray]] = {}
        for voice, file in files:
            self._embeddings[file] = embedding = embed(read_sound(file).wave16k)
            if embedding is not None:
                found.setdefault(voice, []).append(embedding)
        return found

    def _score(self, take: Take, prompts: dict[str, list[np.ndarray]]) -> Score:
        line, sound = take.line, take.sound
        score = Score(line.text, line.voice, take.error)
        if sound is None:
            return score
        score.seconds = sound.seconds
        score.first_audio = take.first_audio
        if take.wall is not None:
            score.rtf = take.wall / sound.seconds
        if take.limit is not None:
            score.at_limit = sound.seconds >= take.limit
        wave = sound.wave16k
        lost = extra = 0
        if "wer" in self._measures:
            score.heard = heard = transcribe(wave, words.language_of(line.text))
            score.word_errors, score.words = words.word_errors(line.text, heard)
            score.character_errors, score.characters = words.character_errors(line.text, heard)
            score.repeats = words.repeats(line.text, heard)
            lost, extra = words.end_errors(line.text, heard)
        score.length_ratio = length_ratio(line, sound)
        score.cut_off = is_cut_off(score.length_ratio, lost)
        score.ran_away = ran_away(score.length_ratio, extra)
        own = None if line.prompt_wav is None else self._embeddings.get(line.prompt_wav)
        if own is not None and (spoken := embed(wave)) is not None:
            score.similarity, score.other = own_and_best_other(spoken, prompts, own, line.voice)
        if "mos" in self._measures:
            score.mos = naturalness(wave)
        return score
