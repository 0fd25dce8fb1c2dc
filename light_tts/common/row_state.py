"""Per-request state kept on the device between steps, so that a step needs no data from the host."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from light_tts.common.sampling import NO_TOKEN, SamplingRules

# Whether a special id (a speech id above the spoken ones) may be drawn. HELD: not before min_outputs.
ALLOWED, BANNED, HELD = 0, 1, 2
_ALIGNED = 32  # words in a line of a cache: kernels that overlap may cache another field
_DTYPES: dict[type, torch.dtype] = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32}


@dataclass(frozen=True)
class RowState:
    """Tensors with one entry per row of the slot table."""

    next_id: Tensor  # (rows,) int32: unified id to feed next
    position: Tensor  # (rows,) int32: number of tokens in the KV cache
    seed: Tensor  # (rows,) int64
    part: Tensor  # (rows,) int64
    step: Tensor  # (rows,) int32: number of outputs of the part so far
    min_outputs: Tensor  # (rows,) int32: no HELD id before this many outputs
    bans: Tensor  # (rows, special ids) int32: ALLOWED, BANNED or HELD
    history: Tensor  # (rows, window) int32: the latest outputs, newest last, padded with NO_TOKEN
    # (rows,): see SamplingRule
    top_p: Tensor  # float32
    top_k: Tensor  # int32
    win_size: Tensor  # int32, at most window
    repeats: Tensor  # int32
    inverse_temperature: Tensor  # float32

    words: Tensor  # int32: the memory of all the others
    record: np.dtype  # a row's fields as the host writes them, one after the other: all but next_id
    # (words of a record, 2) int32: index in `words` of each of them in row 0, and distance from row to row
    places: Tensor

    @classmethod
    def empty(cls, rows: int, window: int, special_ids: int, device: torch.device) -> RowState:
        names = [field.name for field in fields(cls)][:-3]  # all but words, record and places
        kinds: dict[str, type] = dict.fromkeys(names, np.int32)
        kinds |= {"seed": np.int64, "part": np.int64, "top_p": np.float32, "inverse_temperature": np.float32}
        shapes = {"bans": (special_ids,), "history": (window,)}
        row = np.dtype([(name, kinds[name], shapes.get(name, ())) for name in names])
        parts, places, end = {}, [], 0
        for name in names:
            size = row[name].itemsize // 4
            parts[name] = slice(end, end + rows * size)
            if name != "next_id":
                places += [(end + word, size) for word in range(size)]
            end += -(-rows * size // _ALIGNED) * _ALIGNED
        words = torch.zeros(end, dtype=torch.int32, device=device)
        tensors = {
            name: words[parts[name]].view(_DTYPES[kinds[name]]).view(rows, *shapes.get(name, ()))
            for name in names
        }
        tensors["history"].fill_(NO_TOKEN)
        return cls(
            **tensors,
            words=words,
            record=np.dtype([(name, row[name]) for name in names if name != "next_id"]),
            places=torch.tensor(places, dtype=torch.int32, device=device),
        )

    def write(self, rows: Tensor, records: Tensor) -> None:
        """Write the records of these rows. rows: (any,) int32, negative: nothing is written; records: (any,
        words of a record) int32"""
        live = rows >= 0
        first, distance = self.places.long().T
        self.words[first + rows[live, None] * distance] = records[live]

    def banned(self, rows: Tensor) -> Tensor:
        """Return which special ids these rows may not draw next. rows: (batch,) int64 -> (batch, special)
        bool"""
        early = self.step[rows] < self.min_outputs[rows]
        bans = self.bans[rows]
        return (bans == BANNED) | ((bans == HELD) & early[:, None])

    def rules(self, rows: Tensor) -> SamplingRules:
        """Return the sampling rules of these rows. rows: (batch,) int64"""
        return SamplingRules(
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
            win_size=self.win_size[rows],
            repeats=self.repeats[rows],
            inverse_temperature=self.inverse_temperature[rows],
        )
