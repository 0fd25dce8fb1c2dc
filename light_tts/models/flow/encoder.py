"""The flow's encoder: speech tokens at 25 Hz to features at the mel frame rate.

Look-ahead convolutions, conformer blocks (without convolution module) with relative positions, up-sampling,
and more blocks at the higher rate. In streaming mode, attention is causal at chunk granularity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.checkpoint.cosyvoice2_config import EncoderConfig
from light_tts.models.flow.lookahead import PreLookaheadLayer
from light_tts.models.flow.masks import AttentionMask, query_pieces

# Attention scores (batch * heads * queries * keys) computed at once, by device type: few, so that they stay
# in a CPU's cache; more on a GPU.
SCORES_AT_ONCE = {"cpu": 2**19, "cuda": 2**27}


@dataclass(frozen=True)
class EncoderMemory:
    """State after `tokens` tokens of one item, for the features of later ones. ahead: (1, channels, 2) and
    up: (1, width, 2 * ratio), the last inputs of convolutions; keys_values: of each block."""

    tokens: int
    ahead: Tensor
    up: Tensor
    keys_values: Sequence[tuple[Tensor, Tensor] | None]


class UpsampleConformerEncoder(nn.Module):
    """`lookahead`: number of following tokens that a position's features depend on. `ratio`: frames per
    token."""

    def __init__(
        self,
        config: EncoderConfig,
        lookahead: int,
        ratio: int,
        lookahead_channels: int,
        up_channels: int,
        num_up_blocks: int,
    ) -> None:
        super().__init__()
        width = config.output_size
        self.chunk_size = config.static_chunk_size
        self.lookahead = lookahead
        self.ratio = ratio
        self.embed = InputProjection(config.input_size, width)
        self.after_norm = nn.LayerNorm(width, eps=1e-5)
        self.pre_lookahead_layer = PreLookaheadLayer(width, lookahead_channels, lookahead)
        self.encoders = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_blocks))
        self.up_layer = CausalUpsample(width, up_channels, ratio)
        self.up_embed = InputProjection(up_channels, width)
        self.up_encoders = nn.ModuleList(ConformerBlock(config) for _ in range(num_up_blocks))

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,
        streaming: bool | Tensor,
        finalize: bool | Tensor,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: (B, T, input_size) embedded tokens, lengths: (B,); streaming: bool or (B,) bool, attention in
        chunks; finalize: bool or (B,) bool, False: the last `lookahead` tokens are only context; longest: T'
        or more, None: looked up, for which a GPU is waited for. Returns (B, ratio * T', width) and its
        lengths (B,)."""
        x = self.embed(x)
        x, lengths = self.pre_lookahead_layer.of_batch(x, lengths, finalize, longest)
        x = _run_blocks(self.encoders, x, lengths, self._chunk(streaming, x.shape[1], self.chunk_size))
        x = self.up_embed(self.up_layer(x))
        lengths = lengths * self.ratio
        chunk = self._chunk(streaming, x.shape[1], self.chunk_size * self.ratio)
        x = _run_blocks(self.up_encoders, x, lengths, chunk)
        return self.after_norm(x), lengths

    def memory(self) -> EncoderMemory:
        """Return the memory at the start of a sequence."""
        blocks = len(self.encoders) + len(self.up_encoders)
        ahead, up = self.pre_lookahead_layer.before(1), self.up_layer.before(1)
        return EncoderMemory(0, ahead, up, [None] * blocks)

    def extend(self, x: Tensor, tokens: int, memory: EncoderMemory) -> tuple[Tensor, EncoderMemory]:
        """Return the features of the next `tokens` tokens of one sequence, each of which attends to
        everything up to the last of them, as `forward` computes the last chunk. x: (1, T, input_size), these
        tokens and up to `lookahead` more. Returns (1, ratio * tokens, width) and the updated memory."""
        x, ahead = self.pre_lookahead_layer.extend(self.embed(x), tokens, memory.ahead)
        pasts = [AttentionPast(earlier) for earlier in memory.keys_values]
        x = self._extend_blocks(self.encoders, x, memory.tokens, pasts[: len(self.encoders)])
        x, up = self.up_layer.extend(x, memory.up)
        x = self.up_embed(x)
        x = self._extend_blocks(self.up_encoders, x, memory.tokens * self.ratio, pasts[len(self.encoders) :])
        keys_values = [past.keys_values for past in pasts]
        return self.after_norm(x), EncoderMemory(memory.tokens + tokens, ahead, up, keys_values)

    @staticmethod
    def _extend_blocks(
        blocks: nn.ModuleList, x: Tensor, start: int, pasts: Sequence[AttentionPast]
    ) -> Tensor:
        """x: (1, T, width), positions from `start` on."""
        end = start + x.shape[1]
        positions = relative_positions(end, x.shape[2], x.device).to(x.dtype)
        for block, past in zip(blocks, pasts, strict=True):
            x = block(x, positions[: end + x.shape[1] - 1], None, past)
        return x

    @staticmethod
    def _chunk(streaming: bool | Tensor, size: int, chunk: int) -> int | Tensor | None:
        """Return the chunk size in the form of `AttentionMask`."""
        if isinstance(streaming, Tensor):
            return torch.where(streaming, chunk, size)
        return chunk if streaming else None


def _run_blocks(blocks: nn.ModuleList, x: Tensor, lengths: Tensor, chunk: int | Tensor | None) -> Tensor:
    mask = AttentionMask.build(lengths, x.shape[1], chunk)
    positions = relative_positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
    for block in blocks:
        x = block(x, positions, mask)
    return x


def relative_positions(size: int, width: int, device: torch.device) -> Tensor:
    """Return (2 * size - 1, width) float32: sines and cosines of the distances size-1 ... -(size-1),
    interleaved."""
    distance = torch.arange(size - 1, -size, -1, dtype=torch.float32, device=device)
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * -(math.log(10000.0) / width))
    angle = distance[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class InputProjection(nn.Module):
    """Linear and LayerNorm, scaled by sqrt(width)."""

    def __init__(self, input_size: int, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(input_size, width), nn.LayerNorm(width, eps=1e-5))
        self.scale = math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.scale


class CausalUpsample(nn.Module):
    """Repeats each position `ratio` times, followed by a causal convolution."""

    def __init__(self, width: int, channels: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv1d(width, channels, kernel_size=2 * ratio + 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, ratio * T, channels)"""
        return self.extend(x, self.before(len(x)))[0]

    def before(self, batch: int) -> Tensor:
        """Return the padding before the first position: (batch, width, 2 * ratio)"""
        return self.conv.weight.new_zeros(batch, self.conv.in_channels, 2 * self.ratio)

    def extend(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result and the inputs to keep for the following positions."""
        y = torch.cat([before, x.transpose(1, 2).repeat_interleave(self.ratio, dim=2)], dim=2)
        return self.conv(y).transpose(1, 2), y[:, :, -2 * self.ratio :]


class AttentionPast:
    """Keys and values of earlier positions, (1, heads, positions, head_dim) each, or None."""

    def __init__(self, keys_values: tuple[Tensor, Tensor] | None) -> None:
        self.keys_values = keys_values

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values; return all of them, which become the past of the following
        positions.
        """
        if self.keys_values is not None:
            k, v = (torch.cat(both, dim=2) for both in zip(self.keys_values, (k, v), strict=True))
        self.keys_values = k, v
        return k, v


class ConformerBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.output_size
        self.self_attn = RelativeAttention(width, config.attention_heads)
        self.feed_forward = FeedForward(width, config.linear_units)
        self.norm_ff = nn.LayerNorm(width, eps=1e-12)
        self.norm_mha = nn.LayerNorm(width, eps=1e-12)

    def forward(
        self, x: Tensor, positions: Tensor, mask: AttentionMask | None, past: AttentionPast | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, mask, past)
        return x + self.feed_forward(self.norm_ff(x))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class RelativeAttention(nn.Module):
    """score_ij = ((q_i + u) . k_j + (q_i + v) . W_pos pe(i - j)) / sqrt(head_dim), as in Transformer-XL (Dai
    et al. 2019, section 3.3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, mask: AttentionMask | None, past: AttentionPast | None = None
    ) -> Tensor:
        """x: (B, T, width); positions: (T+S-1, width), for the distances S-1 ... -(T-1), where S is the
        number of keys: T, plus those of the past. Queries are processed in pieces, so that memory grows
        linearly."""
        q, k, v = (self._split(linear(x)) for linear in (self.linear_q, self.linear_k, self.linear_v))
        if past is not None:
            k, v = past.join(k, v)
        p = self._split(self.linear_pos(positions)[None])  # (1, heads, T+S-1, head_dim)
        size, keys, scale = q.shape[2], k.shape[2], q.shape[-1] ** -0.5
        pieces = []
        for start, end in query_pieces(q, keys, SCORES_AT_ONCE[q.device.type]):
            queries = q[:, :, start:end]
            # distances between these queries and any key
            near = p[:, :, size - end : size + keys - 1 - start]
            by_distance = (queries + self.pos_bias_v[:, None]) @ near.transpose(2, 3)
            bias = _distance_to_key(by_distance, keys) * scale
            if mask is not None:
                bias = bias.masked_fill(~mask.rows(start, end), -torch.inf)
            queries = queries + self.pos_bias_u[:, None]
            pieces.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=bias))
        return self.linear_out(torch.cat(pieces, dim=2).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, heads, T, head_dim)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _distance_to_key(x: Tensor, keys: int) -> Tensor:
    """Return (B, heads, n, keys), column j for key j, from (B, heads, n, keys + n - 1), where key j is in
    column n-1-i+j of row i. A view: each row starts one column further left."""
    batch, heads, queries, columns = x.shape
    x = x.contiguous()
    strides = (heads * queries * columns, queries * columns, columns - 1, 1)
    return x.as_strided((batch, heads, queries, keys), strides, x.storage_offset() + queries - 1)
