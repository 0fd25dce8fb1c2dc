"""Input and target sequences of the language model: those of CosyVoice2's training, as the server feeds them
(engine/llm/sequence.py), and one that teaches pronunciation.

Besides speech, the model in training predicts phonemes, with tables of its own that are not exported. Their
ids follow those of `SpeechIds`: the teacher's phoneme p is `task + 1 + p`. Phoneme 0 (silence) marks the
beginning and the end of phonemes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from light_tts.models.llm.speech_lm import SpeechIds

NONE = -100  # no target at this position
PHONEME_MARK = 0


@dataclass(frozen=True)
class Spoken:
    """text: (ids,) of the tokenizer; speech: (tokens,) speech ids; phoneme: (tokens,), the phoneme of each
    token; words: (tokens, 2), the range of text ids spoken at each of them: first, and one after the last;
    equal if unknown."""

    text: np.ndarray
    speech: np.ndarray
    phoneme: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class Layout:
    """inputs: (n,) unified ids; speech, phoneme: (n,) targets after each, or NONE; words: (n, 2), range of
    the text positions spoken by the target: first, and one after the last (speech in between in bistream is
    excluded); equal if unknown."""

    inputs: np.ndarray
    speech: np.ndarray
    phoneme: np.ndarray
    words: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.speech) == len(self.phoneme) == len(self.words)

    def __len__(self) -> int:
        return len(self.inputs)


def joined(parts: Sequence[Spoken]) -> Spoken:
    """Join utterances of one speaker; the first becomes the prompt."""
    before = np.cumsum([0, *(len(part.text) for part in parts)])
    return Spoken(
        np.concatenate([part.text for part in parts]),
        np.concatenate([part.speech for part in parts]),
        np.concatenate([part.phoneme for part in parts]),
        np.concatenate([part.words + first for part, first in zip(parts, before, strict=False)]),
    )


def one_shot(spoken: Spoken, ids: SpeechIds) -> Layout:
    """Start, all text, task, all speech."""
    silent = _none(1 + len(spoken.text))
    return Layout(
        np.concatenate([[ids.sos], spoken.text, [ids.task], ids.text_vocab + spoken.speech]),
        np.concatenate([silent, spoken.speech, [ids.eos]]),
        np.concatenate([silent, spoken.phoneme, _none(1)]),
        np.concatenate([_nowhere(len(silent)), 1 + spoken.words, _nowhere(1)]),
    )


def can_bistream(spoken: Spoken, mix: tuple[int, int]) -> bool:
    """Return whether there is enough speech for all whole blocks of text."""
    return len(spoken.text) // mix[0] * mix[1] <= len(spoken.speech)


def bistream(spoken: Spoken, ids: SpeechIds, mix: tuple[int, int], prompt: int = 0) -> Layout:
    """Start; blocks of mix[0] text ids and mix[1] speech tokens, each followed by the fill id as a target
    that is not fed; then the last speech token once more (like the server and CosyVoice2), the rest of the
    text, task, the rest of the speech. `prompt`: number of speech tokens of the prompt; if there are more
    than the blocks hold, none is fed again."""
    blocks, (text_size, speech_size) = len(spoken.text) // mix[0], mix
    text_end, speech_end = blocks * text_size, blocks * speech_size
    units = ids.text_vocab + spoken.speech
    again = units[speech_end - 1 : speech_end] if blocks and prompt <= speech_end else units[:0]
    place = np.arange(len(spoken.text) + 1)
    place += 1 + np.minimum(place // text_size, blocks) * speech_size + (place >= text_end) * len(again)
    first, last = spoken.words.T[0], (spoken.words.T[1] - 1).clip(min=0)
    known = spoken.words.T[1] > first
    words_of = np.stack([place[first], np.where(known, place[last] + 1, place[first])], 1)
    inputs, speech, phoneme, words = [np.array([ids.sos])], [_none(1)], [_none(1)], [_nowhere(1)]
    for block in range(blocks):
        said = slice(block * speech_size, (block + 1) * speech_size)
        inputs += [spoken.text[block * text_size : (block + 1) * text_size], units[said]]
        speech += [_none(text_size - 1), spoken.speech[said], [ids.fill]]
        phoneme += [_none(text_size - 1), spoken.phoneme[said], _none(1)]
        words += [_nowhere(text_size - 1), words_of[said], _nowhere(1)]
    inputs += [again, spoken.text[text_end:], [ids.task], units[speech_end:]]
    silent = _none(len(again) + len(spoken.text) - text_end)
    speech += [silent, spoken.speech[speech_end:], [ids.eos]]
    phoneme += [silent, spoken.phoneme[speech_end:], _none(1)]
    words += [_nowhere(len(silent)), words_of[speech_end:], _nowhere(1)]
    return Layout(*(np.concatenate(parts) for parts in (inputs, speech, phoneme, words)))


def pronunciation(text: np.ndarray, phonemes: np.ndarray, words: np.ndarray, ids: SpeechIds) -> Layout:
    """text: (ids,); phonemes: (n,) of the teacher; words: (n, 2), as in `Spoken`, for each phoneme."""
    marked = np.concatenate([[PHONEME_MARK], phonemes])
    inputs = np.concatenate([[ids.sos], text, ids.task + 1 + marked])
    said = np.concatenate([_none(1 + len(text)), phonemes, [PHONEME_MARK]])
    where = np.concatenate([_nowhere(1 + len(text)), 1 + words, _nowhere(1)])
    return Layout(inputs, _none(len(inputs)), said, where)


def _none(count: int) -> np.ndarray:
    return np.full(count, NONE, np.int32)


def _nowhere(count: int) -> np.ndarray:
    return np.zeros((count, 2), np.int64)
