"""What the flow is trained on: a prompt and what its speaker says next, as tokens and mel spectrograms.

An item is the end of one recording, then the beginning of another by the same speaker, together as many
tokens as a row holds. All tokens and mels lie in the memory of the device, so that a step only gathers them:
an hour takes 29 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from codes import Code, read_codes
from corpus import Corpus
from devices import sent
from torch import Tensor

from light_tts.models.cosyvoice2.config import Config
from light_tts.models.cosyvoice2.frontend.features import flow_mels
from light_tts.models.cosyvoice2.masks import length_mask

PROMPT_TOKENS = (50, 200)  # 2 to 8 seconds
ALL_KNOWN, NONE_KNOWN = 0.5, 0.25
PREFIX_OF_SECOND = 0.3  # else the mel is known up to any place, at most so far into the second recording
AVERAGED = 0.1  # share of items with the average embedding of the speaker
STREAMED = 0.5


class Choice(NamedTuple):
    """What the items of a batch are made of, (batch,) int64 each. first, second: the first token of either
    part, of all tokens; first_size, second_size: tokens; known: tokens whose mel is given; embedding: row of
    the table; complete: 0 where the second recording goes on after the row; streaming: 1 for attention in
    chunks."""

    first: Tensor
    first_size: Tensor
    second: Tensor
    second_size: Tensor
    known: Tensor
    embedding: Tensor
    complete: Tensor
    streaming: Tensor


@dataclass(frozen=True)
class Items:
    """token: (batch, tokens) int64; length: (batch,) tokens; mel: (batch, mels, frames) float32; known: what
    of the mel is given, zero elsewhere; embedding: (batch, size); complete, streaming: (batch,) bool."""

    token: Tensor
    length: Tensor
    mel: Tensor
    known: Tensor
    embedding: Tensor
    complete: Tensor
    streaming: Tensor


class PairedSpeech:
    """Recordings as tokens and mels. On the device: `token`: (all tokens,) int64; `mel`: (all tokens, frames
    a token, mels) float16; `embedding`: (recordings + speakers, size) float32, of each recording and the
    average of each speaker. On the host, (recordings,) each: `start`, `size`: of a recording in these tokens;
    `speaker`: its number."""

    def __init__(
        self, codes: Sequence[Code], mels: Sequence[Tensor], speakers: Sequence[str], row_tokens: int
    ) -> None:
        """mels: (tokens, frames a token, mels) of each recording; row_tokens: tokens of a row."""
        self.row_tokens, self.device = row_tokens, mels[0].device
        self.size = np.array([len(mel) for mel in mels])
        self.start = np.cumsum(self.size) - self.size
        self.mel = torch.cat(list(mels))
        tokens = [code.speech_token[: len(mel)] for code, mel in zip(codes, mels, strict=True)]
        self.token = torch.from_numpy(np.concatenate(tokens)).to(self.device)
        names, self.speaker = np.unique(np.asarray(speakers), return_inverse=True)
        own = np.stack([code.embedding for code in codes])
        own = own / np.linalg.norm(own, axis=1, keepdims=True)
        averages = np.stack([own[self.speaker == number].mean(0) for number in range(len(names))])
        self.embedding = torch.from_numpy(np.concatenate([own, averages]).astype(np.float32)).to(self.device)
        # Recordings in the order of their speakers: those of one lie side by side.
        self._order = np.argsort(self.speaker, kind="stable")
        self._place = np.argsort(self._order)
        self._group_size = np.bincount(self.speaker)
        self._group_start = np.cumsum(self._group_size) - self._group_size

    @classmethod
    def load(
        cls,
        work: Path,
        config: Config,
        device: torch.device,
        row_tokens: int,
        split: str = "train",
        shards: int | None = None,
    ) -> PairedSpeech:
        """Of the recordings that have codes. Raises FileNotFoundError without any."""
        corpus = Corpus.load(work, torch.device("cpu"), split, shards)
        known = read_codes(work)
        codes, mels, speakers = [], [], []
        for utterance, wave in zip(corpus.utterances, corpus.waves(), strict=True):
            if utterance["id"] not in known:
                continue
            codes.append(known[utterance["id"]])
            mels.append(token_mel(wave.to(device), len(codes[-1].speech_token), config).half())
            speakers.append(utterance["speaker"])
        if not codes:
            raise FileNotFoundError(f"{work}: no speech tokens of split {split!r}")
        return cls(codes, mels, speakers, row_tokens)

    def __len__(self) -> int:
        return len(self.size)

    def recording(self, number: int) -> tuple[Tensor, Tensor]:
        """Its tokens (n,) int64 and mel (frames, mels) float32."""
        part = slice(self.start[number], self.start[number] + self.size[number])
        return self.token[part], self.mel[part].float().flatten(0, 1)

    def other(self, recording: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Another recording by the speaker of each, drawn; itself where there is no other. Both (batch,)."""
        speaker = self.speaker[recording]
        size = self._group_size[speaker]
        step = draw.integers(1, np.maximum(size, 2))
        place = (self._place[recording] - self._group_start[speaker] + step) % size
        return self._order[self._group_start[speaker] + place]

    def draw(self, batch: int, draw: np.random.Generator) -> Tensor:
        """(fields of Choice, batch) int64 on the device, which is not waited for."""
        second = draw.integers(len(self), size=batch)
        first = self.other(second, draw)
        low, high = PROMPT_TOKENS
        first_size = np.minimum(self.size[first], draw.integers(low, high + 1, batch)) * (first != second)
        second_size = np.minimum(self.size[second], self.row_tokens - first_size)
        kind = draw.random(batch)
        anywhere = draw.random(batch) * (first_size + PREFIX_OF_SECOND * second_size)
        known = np.select(
            [kind < ALL_KNOWN, kind < ALL_KNOWN + NONE_KNOWN], [first_size, 0], anywhere.astype(np.int64)
        )
        average = len(self) + self.speaker[second]
        chosen = Choice(
            first=self.start[first] + self.size[first] - first_size,
            first_size=first_size,
            second=self.start[second],
            second_size=second_size,
            known=known,
            embedding=np.where(draw.random(batch) < AVERAGED, average, first),
            complete=second_size == self.size[second],
            streaming=draw.random(batch) < STREAMED,
        )
        return sent(torch.from_numpy(np.stack(chosen).astype(np.int64)), self.device)

    def items(self, chosen: Tensor) -> Items:
        """chosen: as `draw` gives it. No synchronisation."""
        choice = Choice(*chosen)
        place = torch.arange(self.row_tokens, device=self.device)
        first_size = choice.first_size[:, None]
        in_first = place < first_size
        row = torch.where(
            in_first, choice.first[:, None] + place, choice.second[:, None] + place - first_size
        )
        length = choice.first_size + choice.second_size
        row = row.where(length_mask(length, self.row_tokens), 0)
        mel = self.mel[row].float()  # (batch, tokens, frames a token, mels)
        given = mel * length_mask(choice.known, self.row_tokens)[..., None, None]
        return Items(
            token=self.token[row],
            length=length,
            mel=mel.flatten(1, 2).transpose(1, 2).contiguous(),
            known=given.flatten(1, 2).transpose(1, 2).contiguous(),
            embedding=self.embedding[choice.embedding],
            complete=choice.complete.bool(),
            streaming=choice.streaming.bool(),
        )


def token_mel(wave: Tensor, tokens: int, config: Config) -> Tensor:
    """wave: (samples,) float32 -> mel (tokens, frames a token, mels), as many tokens as both have."""
    ratio = config.token_mel_ratio
    mel = flow_mels(wave[None], config.mel)[0].T  # (frames, mels)
    tokens = min(tokens, len(mel) // ratio)
    return mel[: tokens * ratio].unflatten(0, (tokens, ratio))
