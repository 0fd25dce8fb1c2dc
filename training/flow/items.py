"""Training items of the flow: a prompt and the speaker's next utterance, as tokens and mel spectrograms.

An item is the end of one recording followed by the beginning of another by the same speaker, together filling
a row. Some of the prompts have room acoustics, and the embedding of such a prompt; the second part is always
clean. All tokens and mels are in device memory, so that a step only gathers them: an hour takes 29 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from light_tts.models.checkpoint.cosyvoice2_config import Config
from light_tts.models.flow.masks import length_mask
from training.codec.codes import Code, Room, read_codes, read_rooms
from training.codec.mels import token_mels
from training.corpus.corpus import Corpus
from training.devices import sent

PROMPT_TOKENS = (50, 200)  # 2 to 8 seconds
ALL_KNOWN, NONE_KNOWN = 0.65, 0.1
# otherwise the mel is known up to a random position, at most this fraction into the second recording
PREFIX_OF_SECOND = 0.3
AVERAGED = 0.1  # fraction of items with the average embedding of the speaker
STREAMED = 0.5
IN_ROOM = 0.3  # fraction of items whose prompt has room acoustics, if the speaker has such recordings
# fraction of rows with wrong tokens, and the maximum fraction of tokens that differ in one digit
MISHEARD, WRONG = 0.4, 0.08


class Choice(NamedTuple):
    """The sources of the items of a batch, (batch,) int64 each. first, second: the first token of either
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
    a token, mels) float16; `embedding`: (recordings + rooms + speakers, size) float32, of each recording and
    the average of each speaker. On the host: `start`, `size`: (recordings + rooms,), of each in these tokens;
    `speaker`: (recordings,), its number. Rooms, recordings made in one, are only prompts."""

    def __init__(
        self,
        codes: Sequence[Code],
        mels: Sequence[Tensor],
        speakers: Sequence[str],
        row_tokens: int,
        rooms: Mapping[int, Room] | None = None,
    ) -> None:
        """mels: (tokens, frames a token, mels) of each recording; row_tokens: tokens of a row; rooms: some of
        the recordings once more, by their numbers."""
        self.row_tokens, self.device = row_tokens, mels[0].device
        rooms = rooms or {}
        mels = [*mels, *(torch.from_numpy(room.mel).to(self.device) for room in rooms.values())]
        codes = [*codes, *(room.code for room in rooms.values())]
        self.size = np.array([len(mel) for mel in mels])
        self.start = np.cumsum(self.size) - self.size
        self.mel = torch.cat(mels)
        tokens = [code.speech_token[: len(mel)] for code, mel in zip(codes, mels, strict=True)]
        self.token = torch.from_numpy(np.concatenate(tokens)).to(self.device)
        names, self.speaker = np.unique(np.asarray(speakers), return_inverse=True)
        own = np.stack([code.embedding for code in codes])
        own = own / np.linalg.norm(own, axis=1, keepdims=True)
        # Recordings in the order of their speakers: those of one lie side by side. Likewise rooms.
        self._order = np.argsort(self.speaker, kind="stable")
        self._place = np.argsort(self._order)
        self._group_size = np.bincount(self.speaker)
        self._group_start = np.cumsum(self._group_size) - self._group_size
        self._clean = np.array(list(rooms), np.int64)
        room_speaker = self.speaker[self._clean]
        self._room_order = np.argsort(room_speaker, kind="stable")
        self._room_group_size = np.bincount(room_speaker, minlength=len(names))
        self._room_group_start = np.cumsum(self._room_group_size) - self._room_group_size
        groups = np.split(self._order, self._group_start[1:])
        averages = np.stack([own[group].mean(0) for group in groups])
        self.embedding = torch.from_numpy(np.concatenate([own, averages]).astype(np.float32)).to(self.device)

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
        """Items of the recordings that have codes. Raises FileNotFoundError without any."""
        return cls.of(Corpus.load(work, device, split, shards), work, config, row_tokens)[0]

    @classmethod
    def of(
        cls, corpus: Corpus, work: Path, config: Config, row_tokens: int
    ) -> tuple[PairedSpeech, list[int]]:
        """Items of the corpus's utterances that have codes, and the number in it of each recording. Raises
        FileNotFoundError without any."""
        known, in_rooms = read_codes(work), read_rooms(work)
        names = [utterance["id"] for utterance in corpus.utterances]
        coded = [number for number, name in enumerate(names) if name in known]
        if not coded:
            raise FileNotFoundError(f"{work}: no speech tokens of this speech: run encode.py first")
        codes = [known[names[number]] for number in coded]
        mels = token_mels(corpus, coded, [len(code.speech_token) for code in codes], config)
        speakers = [corpus.utterances[number]["speaker"] for number in coded]
        rooms = {row: in_rooms[names[n]] for row, n in enumerate(coded) if names[n] in in_rooms}
        return cls(codes, mels, speakers, row_tokens, rooms), coded

    def __len__(self) -> int:
        return len(self.speaker)

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

    def room(self, recording: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """A recording made in a room by the speaker of each, but not one of itself, drawn; -1 where there is
        none. Both (batch,)."""
        speaker = self.speaker[recording]
        size = self._room_group_size[speaker]
        if not len(self._clean):
            return np.full_like(recording, -1)
        place = self._room_group_start[speaker] + draw.integers(0, np.maximum(size, 1))
        room = self._room_order[np.minimum(place, len(self._clean) - 1)]
        return np.where((size > 0) & (self._clean[room] != recording), len(self) + room, -1)

    def draw(self, batch: int, draw: np.random.Generator) -> Tensor:
        """(fields of Choice, batch) int64 on the device, which is not waited for."""
        second = draw.integers(len(self), size=batch)
        room = self.room(second, draw)
        in_room = (room >= 0) & (draw.random(batch) < IN_ROOM)
        first = np.where(in_room, room, self.other(second, draw))
        low, high = PROMPT_TOKENS
        first_size = np.minimum(self.size[first], draw.integers(low, high + 1, batch)) * (first != second)
        second_size = np.minimum(self.size[second], self.row_tokens - first_size)
        kind = draw.random(batch)
        anywhere = draw.random(batch) * (first_size + PREFIX_OF_SECOND * second_size)
        known = np.select(
            [in_room | (kind < ALL_KNOWN), kind < ALL_KNOWN + NONE_KNOWN],
            [first_size, 0],
            anywhere.astype(np.int64),
        )
        averaged = ~in_room & (draw.random(batch) < AVERAGED)
        embedding = np.where(averaged, len(self.size) + self.speaker[second], first)
        streaming = draw.random(batch) < STREAMED
        return self._sent(first, first_size, second, second_size, known, embedding, streaming)

    def pairs(self, second: np.ndarray, draw: np.random.Generator) -> Tensor:
        """second: (batch,) recordings -> as `draw` does, these after clean prompts whose mel is known, as far
        as a row holds them."""
        first = self.other(second, draw)
        low, high = PROMPT_TOKENS
        first_size = np.minimum(self.size[first], draw.integers(low, high + 1, len(second)))
        second_size = np.minimum(self.size[second], self.row_tokens - first_size)
        whole = np.zeros_like(second)
        return self._sent(first, first_size, second, second_size, first_size, first, whole)

    def _sent(
        self,
        first: np.ndarray,
        first_size: np.ndarray,
        second: np.ndarray,
        second_size: np.ndarray,
        known: np.ndarray,
        embedding: np.ndarray,
        streaming: np.ndarray,
    ) -> Tensor:
        """The end of each first recording and the beginning of each second one, as `draw` returns them."""
        chosen = Choice(
            first=self.start[first] + self.size[first] - first_size,
            first_size=first_size,
            second=self.start[second],
            second_size=second_size,
            known=known,
            embedding=embedding,
            complete=second_size == self.size[second],
            streaming=streaming,
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


def misheard(token: Tensor, places: Tensor) -> Tensor:
    """token: (batch, tokens) int64 -> the same, where in some rows some tokens are others that differ in one
    digit: the language model's are no better. places: (digits,) int64, what each digit counts, ascending. No
    synchronisation."""
    rows = len(token)
    levels = places[1] // places[0]
    share = WRONG * torch.rand(rows, 1, device=token.device)
    share = torch.where(torch.rand_like(share) < MISHEARD, share, 0.0)
    place = places[torch.randint(len(places), token.shape, device=token.device)]
    digit = token // place % levels
    step = 1 + (torch.rand(token.shape, device=token.device) * (levels - 1)).long()
    wrong = token + ((digit + step) % levels - digit) * place
    return torch.where(torch.rand(token.shape, device=token.device) < share, wrong, token)
