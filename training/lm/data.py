"""Training data of the language model from the work folder: sequences of text and speech, and of text and
phonemes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from light_tts.models.frontend.tokenizer import TextTokenizer
from light_tts.models.llm.speech_lm import SpeechIds
from training.checkpoint import checkpoint_folder
from training.codec.codes import read_codes
from training.corpus.corpus import SILENCE, heard_at
from training.corpus.mandarin import FILE as MANDARIN
from training.corpus.packages import phoneme_ids
from training.lm.layouts import Layout, Spoken, bistream, can_bistream, joined, one_shot, pronunciation
from training.lm.packing import ROW
from training.lm.words import TOKEN_RATE, ids_of_words, spoken_words, words_at
from training.work import read_lines

PARTS = (0.3, 0.6, 0.1)  # fractions of sequences of one, two and three utterances
BISTREAM = 0.4  # fraction of speech sequences
PRONUNCIATION = 0.3  # fraction of tokens in phoneme sequences


class Texts:
    """Sentences and utterances as read by the language model."""

    def __init__(self, work: Path, shards: int | None) -> None:
        """Raises FileNotFoundError if an earlier step has not run."""
        self._work, self._shards = work, shards
        self._encoding = TextTokenizer(checkpoint_folder(work))._encoding  # provides offsets, too
        self._phonemes = phoneme_ids(work)
        self.phonemes = max(self._phonemes.values()) + 1
        # utterances read so far, and the number of these with word alignment
        self.utterances, self.aligned = 0, 0

    def read(self, line: dict) -> tuple[np.ndarray, np.ndarray | None]:
        """line: of sentences or utterances -> (ids of the text,), and (phonemes, 2): the ids that each
        phoneme belongs to, or None if unknown."""
        encoded = self._encoding.encode(line["spoken"], add_special_tokens=False)
        words = ids_of_words(line["spoken"], encoded.offsets, line.get("words"))
        return np.array(encoded.ids, np.int64), spoken_words(line["phonemes"], words)

    def sounds(self, phonemes: str) -> np.ndarray:
        return np.array([self._phonemes[phoneme] for phoneme in phonemes], np.int64)

    @property
    def mandarin(self) -> bool:
        """Whether there are Mandarin sentences."""
        return (self._work / MANDARIN).exists()

    def sentences(self, split: str) -> list[dict]:
        """Lines of sentences.jsonl."""
        return [line for line in read_lines(self._work / "sentences.jsonl") if line["split"] == split]

    def mandarin_sentences(self, split: str) -> list[dict]:
        """Lines of mandarin.jsonl, none without it."""
        lines = read_lines(self._work / MANDARIN) if self.mandarin else []
        return [line for line in lines if line["split"] == split]

    def pronunciations(self, split: str, ids: SpeechIds) -> list[Layout]:
        """Return pronunciations of all sentences in all languages, spoken or not."""
        found = []
        for line in [*self.sentences(split), *self.mandarin_sentences(split)]:
            text, words = self.read(line)
            sounds = self.sounds(line["phonemes"])
            words = np.zeros((len(sounds), 2), np.int64) if words is None else words
            found.append(pronunciation(text, sounds, words, ids))
        return found

    def voices(self, split: str, mandarin: bool | None = None) -> list[list[Spoken]]:
        """Return each speaker's utterances that have speech tokens; only Mandarin or only English ones if
        `mandarin` is given."""
        codes = read_codes(self._work)
        lines = {
            u["id"]: u
            for u in read_lines(self._work / "utterances.jsonl")
            if u["split"] == split and mandarin in (None, "words" in u)
        }
        voices: dict[str, list[Spoken]] = {}
        for file in sorted((self._work / "speech").glob("?????.npz"))[: self._shards]:
            with np.load(file) as shard:
                names, durations = shard["id"], shard["durations"]
                durations = np.split(durations, np.cumsum(shard["phonemes"])[:-1])
            for name, seconds in zip(map(str, names), durations, strict=True):
                if name in lines and name in codes:
                    spoken = self._utterance(lines[name], codes[name].speech_token, seconds)
                    voices.setdefault(lines[name]["speaker"], []).append(spoken)
        if not voices:
            raise FileNotFoundError(f"{self._work}: no speech tokens of split {split!r}")
        return list(voices.values())

    def spoken_lines(self, split: str) -> tuple[list[dict], list[np.ndarray]]:
        """Return the English lines of utterances.jsonl that have speech tokens, and the tokens."""
        codes = read_codes(self._work)
        lines = read_lines(self._work / "utterances.jsonl")
        lines = [u for u in lines if u["split"] == split and u["id"] in codes and "words" not in u]
        return lines, [codes[line["id"]].speech_token for line in lines]

    def _utterance(self, line: dict, speech: np.ndarray, durations: np.ndarray) -> Spoken:
        text, words = self.read(line)
        sounds = np.pad(self.sounds(line["phonemes"]), 1, constant_values=SILENCE)
        self.utterances += 1
        if words is None:
            ids = np.zeros((len(speech), 2), np.int64)
        else:
            self.aligned += 1
            ids = words_at(np.pad(words, ((1, 1), (0, 0)), mode="edge"), durations, len(speech))
        return Spoken(text, speech, phonemes_of_tokens(sounds, durations, len(speech)), ids)


def phonemes_of_tokens(phonemes: np.ndarray, durations: np.ndarray, tokens: int) -> np.ndarray:
    """phonemes, durations: (n,), seconds -> (tokens,) the phoneme in the middle of each speech token."""
    return phonemes[heard_at((np.arange(tokens) + 0.5) / TOKEN_RATE, durations)]


def training_layouts(
    voices: list[list[Spoken]],
    pronunciations: list[Layout],
    ids: SpeechIds,
    mix: tuple[int, int],
    draw: np.random.Generator,
) -> Iterator[Layout]:
    """Endless, with the fractions given above. Sequences of several utterances have one voice, like a prompt
    and the following speech."""
    by_utterance = [voice for voice in voices for _ in voice]
    more_than = np.cumsum(PARTS)[:-1]
    tokens = told = 0
    while True:
        if told <= PRONUNCIATION * tokens:
            layout = pronunciations[draw.integers(len(pronunciations))]
            told += len(layout)
        else:
            voice = by_utterance[draw.integers(len(by_utterance))]
            count = min(len(voice), 1 + int((draw.random() > more_than).sum()))
            parts = [voice[number] for number in draw.choice(len(voice), count, replace=False)]
            while len(parts) > 1 and not fits(parts):
                parts.pop()
            layout = speech_layout(parts, ids, mix, draw.random() < BISTREAM)
        tokens += len(layout)
        yield layout


def fits(parts: list[Spoken]) -> bool:
    """Return whether a row has room for them, including marks and what bistream repeats."""
    return sum(len(part.text) + len(part.speech) for part in parts) + 3 <= ROW


def speech_layout(parts: list[Spoken], ids: SpeechIds, mix: tuple[int, int], streams: bool) -> Layout:
    """Return the layout of concatenated utterances of one voice; bistream if requested and possible."""
    whole = joined(parts)
    if streams and can_bistream(whole, mix):
        return bistream(whole, ids, mix, prompt=len(whole.speech) - len(parts[-1].speech))
    return one_shot(whole, ids)
