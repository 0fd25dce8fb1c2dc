"""Attention over the KV pool in plain PyTorch. It runs on every device and is the reference for the kernels.

A batch consists of the new tokens of some requests; their earlier tokens are in the pool already. So a
prefill, a piece of a prefill and a decode step differ only in their lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.common.kv_pool import KVPool, SlotTable
from light_tts.models.llm.speech_lm import AttentionContext


@dataclass(frozen=True)
class RowSpan:
    """New tokens of one request: positions [start, start + length) of table row `row`."""

    row: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class TorchAttention:
    """Processes one request at a time, so that the result never depends on the rest of the batch."""

    def __init__(self, pool: KVPool, table: SlotTable) -> None:
        self._pool = pool
        self._table = table

    def __call__(self, spans: list[RowSpan]) -> AttentionContext:
        """Return the attention for spans of any lengths, whose tokens are concatenated in the batch. Every
        query attends to all tokens of its request up to its own position."""
        requests, start = [], 0
        for span in spans:
            new = self._table.index(span.row, span.start, span.end)
            every = self._table.index(span.row, 0, span.end)
            requests.append((slice(start, start + span.length), new, every, self._mask(span)))
            start += span.length

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            for tokens, new, every, mask in requests:
                self._pool.write(layer, new, k[tokens], v[tokens])
                out[tokens] = attention(q[tokens], *self._pool.read(layer, every), mask)
            return out

        return attend

    def _mask(self, span: RowSpan) -> Tensor | None:
        """Return the mask of `attention` for a request's new tokens."""
        if span.length == 1 or span.start == 0:
            return None
        device = self._table.device_slots.device
        return torch.ones(span.length, span.end, dtype=torch.bool, device=device).tril_(span.start)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention of one request.

    q: (queries, heads, head_dim); k, v: (keys, kv_heads, head_dim); mask: (queries, keys), True where a query
    sees a key. Without a mask there is either a single query, which sees all keys, or as many queries as
    keys, with causal attention. Returns the shape of q.
    """
    if len(q) == 1:
        return _single(q, k, v)
    causal = mask is None
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return out[0].transpose(0, 1)


def _single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a single query, for which two small matrix products are faster than the general kernel."""
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    q = q.view(kv_heads, heads // kv_heads, size) * size**-0.5
    weights = (q @ k.permute(1, 2, 0)).softmax(-1)
    return (weights @ v.transpose(0, 1)).view(1, heads, size)
