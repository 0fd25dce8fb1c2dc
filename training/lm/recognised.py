"""Recognises what speech tokens say without an audio recogniser: the phonemes that the speech tokenizer was
trained to encode, compared with those of the text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import training_file
from training.codec.speech_tokenizer import BLANK, DIGITS, LEVELS, NAME, PUNCTUATION, STRESS, CodePredictor
from training.corpus.corpus import SILENCE
from training.corpus.packages import phoneme_ids
from training.loop import averaged_weights
from training.onnx.half import part_of

SWITCH = 2.0  # by how many nats another phoneme must be more likely before it is accepted
LOST = 0.6  # fraction of a word's phonemes whose absence makes it missing
EXTRA = 3  # consecutive phonemes that are not in the text: an insertion


class Recogniser:
    """Reads phonemes from speech tokens, 50 per second, with the tokenizer's trained predictor."""

    def __init__(self, work: Path, device: torch.device) -> None:
        """Raises FileNotFoundError without the training file of the speech tokenizer."""
        weights = part_of(averaged_weights(training_file(work, NAME)), "listener")
        speakers, mels = len(weights["speaker.weight"]), len(weights["mel.bias"]) // 2
        ids = phoneme_ids(work)
        self._listener = CodePredictor(max(ids.values()) + 1, speakers, mels)
        self._listener.load_state_dict(weights)
        self._listener.to(device).eval()
        self._device = device
        self._places = torch.tensor([LEVELS**n for n in range(DIGITS)], device=device)

    @torch.no_grad()
    def __call__(self, spoken: list[np.ndarray]) -> list[list[int]]:
        """spoken: (tokens,) each -> the phonemes of each, without repeats and silence."""
        longest = max(1, max(map(len, spoken)))
        padded = [np.pad(tokens, (0, longest - len(tokens)), mode="edge") for tokens in spoken if len(tokens)]
        if not padded:
            return [[] for _ in spoken]
        tokens = torch.from_numpy(np.stack(padded).astype(np.int64)).to(self._device)
        codes = tokens[..., None].div(self._places, rounding_mode="floor") % LEVELS - 1
        logits, _ = self._listener.recognise(codes.float())
        found = iter(likeliest(logits.log_softmax(-1), SWITCH).cpu().numpy())
        return [collapsed(next(found)[: 2 * len(tokens)]) if len(tokens) else [] for tokens in spoken]


def likeliest(log_probs: Tensor, switch: float) -> Tensor:
    """Return the most likely sequence if each change of label costs `switch`. log_probs: (batch, frames,
    labels) -> (batch, frames) int64"""
    batch, frames, labels = log_probs.shape
    stay = torch.arange(labels, device=log_probs.device).expand(batch, labels)
    score, before = log_probs[:, 0], []
    for frame in range(1, frames):
        best, label = score.max(-1, keepdim=True)
        moved = score < best - switch
        before.append(torch.where(moved, label, stay))
        score = torch.where(moved, best - switch, score) + log_probs[:, frame]
    path = [score.argmax(-1, keepdim=True)]
    for step in reversed(before):
        path.append(step.gather(1, path[-1]))
    return torch.cat(path[::-1], 1)


def collapsed(labels: np.ndarray) -> list[int]:
    """Remove repeats and silence."""
    change = np.flatnonzero(np.diff(labels, prepend=-1))
    return [int(label) for label in labels[change] if label != SILENCE]


@dataclass(frozen=True)
class Reference:
    """phonemes: as audible; word: index of the word of each of them."""

    phonemes: list[int]
    word: list[int]

    @classmethod
    def of(cls, written: str, ids: dict[str, int]) -> Reference:
        """written: the teacher's phonemes of a text. Two equal ones in a row count as one."""
        phonemes: list[int] = []
        word: list[int] = []
        for number, sounds in enumerate(written.split(BLANK)):
            for sound in sounds:
                if sound not in STRESS + PUNCTUATION and (not phonemes or phonemes[-1] != ids[sound]):
                    phonemes.append(ids[sound])
                    word.append(number)
        return cls(phonemes, word)


@dataclass(frozen=True)
class Faults:
    """errors: wrong, missing or extra phonemes; missing: missing words; extra: stretches that are not in the
    text; phonemes, words: of the text."""

    errors: int
    missing: int
    extra: int
    phonemes: int
    words: int


def faults(reference: Reference, heard: list[int]) -> Faults:
    """Count the errors of the alignment with the fewest errors."""
    expected = reference.phonemes
    cost = [list(range(len(heard) + 1))]
    for row, phoneme in enumerate(expected, 1):
        above, line = cost[-1], [row]
        for column, other in enumerate(heard, 1):
            replaced = above[column - 1] + (phoneme != other)
            line.append(min(replaced, above[column] + 1, line[-1] + 1))
        cost.append(line)
    lost: dict[int, int] = {}
    extra = run = 0
    row, column = len(expected), len(heard)
    while row or column:
        here = cost[row][column]
        if row and column and here == cost[row - 1][column - 1] + (expected[row - 1] != heard[column - 1]):
            row, column, run = row - 1, column - 1, 0
        elif row and here == cost[row - 1][column] + 1:
            row -= 1
            lost[reference.word[row]] = lost.get(reference.word[row], 0) + 1
        else:
            column, run = column - 1, run + 1
            extra += run == EXTRA
    sizes: dict[int, int] = {}
    for word in reference.word:
        sizes[word] = sizes.get(word, 0) + 1
    missing = sum(lost.get(word, 0) >= max(LOST * size, 2) for word, size in sizes.items())
    return Faults(cost[-1][-1], missing, extra, len(expected), len(sizes))
