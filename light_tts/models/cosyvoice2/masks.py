"""Masks of padded batches."""

from __future__ import annotations

import torch
from torch import Tensor


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths -> (B, size) bool, True where there is data."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def attention_mask(lengths: Tensor, size: int, chunk: int | Tensor | None) -> Tensor | None:
    """Which keys a query may see: (B, 1, size, size) or (B, 1, 1, size) bool; None: all of them.

    `chunk`: query i sees the keys before the end of its chunk, j < (i // chunk + 1) * chunk; (B,) int: each
    item its own; None: all keys.
    Key 0 is always seen, so that the rows of padding stay finite.
    """
    if chunk is None and len(lengths) == 1:
        return None  # a batch of one has no padding
    mask = length_mask(lengths, size)[:, None, None, :]
    if chunk is not None:
        position = torch.arange(size, device=lengths.device)
        if isinstance(chunk, Tensor):
            chunk = chunk[:, None, None]
        chunk_end = (position // chunk + 1) * chunk
        mask = mask & (position < chunk_end.unsqueeze(-1))
    return mask
