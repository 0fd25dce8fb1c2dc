"""Per-request state kept on the device between steps, so that a step needs no data from the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from light_tts.common.sampling import NO_TOKEN, SamplingRules

# Whether a special id (a speech id above the spoken ones) may be drawn. HELD: not before min_outputs.
ALLOWED, BANNED, HELD = 0, 1, 2
_ALIGNED = 32  # words in a line of a cache: kernels that overlap may cache another field


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

    words: Tensor  # int32: the memory of all the others, so that one copy writes several

    @classmethod
    def empty(cls, rows: int, window: int, special_ids: int, device: torch.device) -> RowState:
        shapes: dict[str, tuple[int, ...]] = {field.name: (rows,) for field in fields(cls)[:-1]}
        shapes.update(bans=(rows, special_ids), history=(rows, window))
        dtypes = {"seed": torch.int64, "part": torch.int64}
        dtypes.update(top_p=torch.float32, inverse_temperature=torch.float32)
        parts, end = {}, 0
        for name, shape in shapes.items():
            size = math.prod(shape) * (2 if name in ("seed", "part") else 1)
            parts[name] = slice(end, end + size)
            end += -(-size // _ALIGNED) * _ALIGNED
        words = torch.zeros(end, dtype=torch.int32, device=device)
        tensors = {
            name: words[part].view(dtypes.get(name, torch.int32)).view(shapes[name])
            for name, part in parts.items()
        }
        tensors["history"].fill_(NO_TOKEN)
        return cls(**tensors, words=words)

    def places(self, name: str, row: int) -> range:
        """Return the indices in `words` of a row of a field."""
        field: Tensor = getattr(self, name)
        words = field.nbytes // (4 * len(field))
        first = field.storage_offset() * field.element_size() // 4 + row * words
        return range(first, first + words)

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
