"""Attention of the language model in training: over rows of several sequences, with some heads trained to
attend to the words being spoken."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class Packed:
    """Attention in rows of concatenated sequences. sequence: (rows, n), the number of each token's sequence.
    An `AttentionContext` without a cache.

    With `watched`, it also computes how much the `heads`, as (layer, head), attend elsewhere than to the
    words being spoken.
    """

    def __init__(
        self,
        sequence: Tensor,
        dtype: torch.dtype,
        watched: Watched | None = None,
        heads: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self._rows, size = sequence.shape
        past = torch.ones(size, size, dtype=torch.bool, device=sequence.device).tril()
        seen = past & (sequence[:, None, :, None] == sequence[:, None, None, :])
        self._bias = torch.zeros(seen.shape, dtype=dtype, device=sequence.device)
        self._bias.masked_fill_(~seen, -math.inf)  # (rows, 1, n, n)
        self._watched, self._heads = watched, heads if watched is not None else ()
        if watched is not None:
            watched.see(seen[:, 0])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        q, k, v = (self._by_head(x, heads) for x in (q, k, v))
        for watched_layer, head in self._heads:
            if layer == watched_layer:
                self._watched.add(q[:, head], k[:, head])
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v, self._bias)
        return out.transpose(1, 2).flatten(0, 1)

    def _by_head(self, x: Tensor, heads: int) -> Tensor:
        """(rows * n, kv_heads, head_dim) -> (rows, heads, n, head_dim)"""
        x = x[:, :, None].expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2)
        return x.unflatten(0, (self._rows, -1)).transpose(1, 2).to(self._bias.dtype)


class Watched:
    """Measures the fraction of attention that heads give to the text being spoken. words: (2, rows, n), begin
    and end of its positions, equal if unknown; text: (rows, n), which positions hold text."""

    def __init__(self, words: Tensor, text: Tensor) -> None:
        place = torch.arange(text.shape[1], device=text.device)
        begin, end = words[..., None]
        self._meant = (place >= begin) & (place < end) & text[:, None]  # (rows, n, n)
        self._nats: list[Tensor] = []

    def see(self, seen: Tensor) -> None:
        """seen: (rows, n, n), what each may attend to. Text that has not arrived is ignored."""
        self._seen = seen
        self._meant = self._meant & seen
        self._known = self._meant.any(-1)
        # positions without such text have no loss, and their gradient is 0
        self._meant = self._meant | (seen & ~self._known[..., None])

    def add(self, q: Tensor, k: Tensor) -> None:
        """One head. q, k: (rows, n, head_dim)"""
        with torch.autocast(q.device.type, enabled=False):
            scores = q.float() @ k.float().transpose(1, 2) / math.sqrt(q.shape[-1])
            there = scores.masked_fill(~self._meant, -math.inf).logsumexp(-1)
            anywhere = scores.masked_fill(~self._seen, -math.inf).logsumexp(-1)
        self._nats.append(anywhere - there)  # (rows, n)

    @property
    def known(self) -> Tensor:
        """(rows, n) bool, the positions whose spoken text is known."""
        return self._known

    @property
    def nats(self) -> Tensor:
        """(heads, rows, n), minus the logarithm of the fraction; 0 where it is unknown."""
        return torch.stack(self._nats)

    @property
    def loss(self) -> Tensor:
        """Their mean."""
        return self.nats.sum() / (self._known.sum() * len(self._nats)).clamp(min=1)
