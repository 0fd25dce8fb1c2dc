"""Per-request state kept on the device between steps, so that a step needs no data from the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from light_tts.common.sampling import NO_TOKEN, SamplingRules

# Whether a special id (a speech id above the spoken ones) may be drawn. HELD: not before min_outputs.
ALLOWED, BANNED, HELD = 0, 1, 2


@dataclass(frozen=True)
class RowState:
    """Tensors with one entry per row of the slot table."""

    next_id: Tensor  # (rows,) int32: unified id to feed next
    position: Tensor  # (rows,) int32: number of tokens in the KV cache
    seed: Tensor  # (rows,) int64
    part: Tensor  # (rows,) int64
    step: Tensor  # (rows,) int32: number of outputs of the part so far
    min_outputs: Tensor  # (rows,) int32: no HELD id before this many outputs
    bans: Tensor  # (rows, special ids) int8: ALLOWED, BANNED or HELD
    history: Tensor  # (rows, window) int32: the latest outputs, newest last, padded with NO_TOKEN
    # (rows,): see SamplingRule
    top_p: Tensor  # float32
    top_k: Tensor  # int32
    win_size: Tensor  # int32, at most window
    repeats: Tensor  # int32
    inverse_temperature: Tensor  # float32

    @classmethod
    def empty(cls, rows: int, window: int, special_ids: int, device: torch.device) -> RowState:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            next_id=zeros(rows),
            position=zeros(rows),
            seed=zeros(rows, dtype=torch.int64),
            part=zeros(rows, dtype=torch.int64),
            step=zeros(rows),
            min_outputs=zeros(rows),
            bans=zeros(rows, special_ids, dtype=torch.int8),
            history=zeros(rows, window).fill_(NO_TOKEN),
            top_p=zeros(rows, dtype=torch.float32),
            top_k=zeros(rows),
            win_size=zeros(rows),
            repeats=zeros(rows),
            inverse_temperature=zeros(rows, dtype=torch.float32),
        )

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
