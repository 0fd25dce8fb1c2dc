"""Functions that all estimators use: the embedding of the time, and attention with a mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.models.flow.masks import Mask, query_pieces

# Maximum attention scores (batch * heads * queries * keys) per call by device type, if a mask is needed; the
# mask is as large as the scores of one head.
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**29}


def sinusoids(t: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width) float32: sines, then cosines, of 1000 t times decreasing frequencies."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000.0) / (half - 1)))
    angle = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """q, k, v: (B, heads, T, head_dim); mask: None: every query sees all keys. Returns the attended values,
    shaped like q. With a mask, queries are processed in pieces, so that memory grows linearly."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    pieces = [
        F.scaled_dot_product_attention(q[:, :, start:end], k, v, attn_mask=mask.rows(start, end))
        for start, end in query_pieces(q, k.shape[2], SCORES_AT_ONCE[q.device.type])
    ]
    return torch.cat(pieces, dim=2)
