"""Masks of padded batches, and splitting of attention so that its memory grows linearly with the frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths -> (B, size) bool, True where there is data."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Mask(Protocol):
    """Which keys a query may see."""

    def rows(self, start: int, end: int) -> Tensor:
        """The mask of the queries [start, end): bool, (B, 1, end - start, size) or (B, 1, 1, size)."""


class AttentionMask:
    """Computes the mask for any subset of the queries, because a full mask grows quadratically.

    `chunk`: query i sees the keys before the end of its chunk, j < (i // chunk + 1) * chunk; (B,) int: one
    value per item; None: all keys. Key 0 is always visible, so that padding rows stay finite.
    """

    def __init__(self, lengths: Tensor, size: int, chunk: int | Tensor | None) -> None:
        self._lengths = lengths
        self._size = size
        self._chunk = chunk
        self._whole: Tensor | None = None

    @classmethod
    def build(cls, lengths: Tensor, size: int, chunk: int | Tensor | None) -> AttentionMask | None:
        """Return the mask, or None if every query sees all keys."""
        if chunk is None and len(lengths) == 1:
            return None  # a batch of one has no padding
        return cls(lengths, size, chunk)

    def repeat(self, copies: int) -> AttentionMask:
        """Return the mask of a batch repeated this often; that of a batch of one broadcasts."""
        if len(self._lengths) == 1:
            return self
        chunk = self._chunk.repeat(copies) if isinstance(self._chunk, Tensor) else self._chunk
        return AttentionMask(self._lengths.repeat(copies), self._size, chunk)

    def rows(self, start: int, end: int) -> Tensor:
        """See `Mask`."""
        if (start, end) != (0, self._size):
            return self._build(start, end)
        if self._whole is None:  # shared by all layers
            self._whole = self._build(0, self._size)
        return self._whole

    def _build(self, start: int, end: int) -> Tensor:
        position = torch.arange(self._size, device=self._lengths.device)
        mask = (position < self._lengths[:, None])[:, None, None, :]
        if self._chunk is None:
            return mask
        chunk = self._chunk[:, None, None] if isinstance(self._chunk, Tensor) else self._chunk
        chunk_end = (position[start:end] // chunk + 1) * chunk
        return mask & (position < chunk_end.unsqueeze(-1))


@dataclass(frozen=True)
class EstimatorMasks:
    """frames: (B, 1, T), 1 where there is data; attention: None: every frame sees all others."""

    frames: Tensor
    attention: Mask | None

    @classmethod
    def build(
        cls, lengths: Tensor, size: int, chunk: int | Tensor | None, dtype: torch.dtype, copies: int = 1
    ) -> EstimatorMasks:
        """`chunk`: attention chunk in frames, (B,): one value per item, None: full attention; `copies`: how
        often the batch is repeated."""
        frames = length_mask(lengths, size)[:, None].to(dtype).repeat(copies, 1, 1)
        attention = AttentionMask.build(lengths, size, chunk)
        return cls(frames, attention if attention is None else attention.repeat(copies))


def query_pieces(q: Tensor, keys: int, scores: int) -> list[tuple[int, int]]:
    """q: (B, heads, T, head_dim) -> (start, end) of pieces of the queries, each with at most `scores` scores
    for this number of keys (at least one query)."""
    batch, heads, size, _ = q.shape
    most = max(1, scores // (batch * heads * keys))
    return [(start, min(start + most, size)) for start in range(0, size, most)]
