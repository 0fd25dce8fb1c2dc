"""The flow's encoder: speech tokens at 25 Hz to features at the mel frame rate.

Look-ahead convolutions, conformer blocks (without convolution module) with relative positions, up-sampling,
and more blocks at the higher rate. In the streaming mode attention is causal at the granularity of a chunk.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.cosyvoice2.config import EncoderConfig
from light_tts.models.cosyvoice2.masks import attention_mask, length_mask


class UpsampleConformerEncoder(nn.Module):
    """`lookahead`: tokens after a position that its features depend on. `ratio`: frames a token."""

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
        x = self.embed(x) * length_mask(lengths, x.shape[1])[..., None]
        x = self.pre_lookahead_layer(x)
        finalize = torch.as_tensor(finalize, device=lengths.device)
        lengths = torch.where(finalize, lengths, lengths - self.lookahead)
        x = x[:, : int(lengths.max()) if longest is None else longest]
        x = _run_blocks(self.encoders, x, lengths, self._chunk(streaming, x.shape[1], self.chunk_size))
        x = self.up_embed(self.up_layer(x))
        lengths = lengths * self.ratio
        chunk = self._chunk(streaming, x.shape[1], self.chunk_size * self.ratio)
        x = _run_blocks(self.up_encoders, x, lengths, chunk)
        return self.after_norm(x), lengths

    @staticmethod
    def _chunk(streaming: bool | Tensor, size: int, chunk: int) -> int | Tensor | None:
        """See `attention_mask`."""
        if isinstance(streaming, Tensor):
            return torch.where(streaming, chunk, size)
        return chunk if streaming else None


def _run_blocks(blocks: nn.ModuleList, x: Tensor, lengths: Tensor, chunk: int | Tensor | None) -> Tensor:
    mask = attention_mask(lengths, x.shape[1], chunk)
    positions = relative_positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
    for block in blocks:
        x = block(x, positions, mask)
    return x


def relative_positions(size: int, width: int, device: torch.device) -> Tensor:
    """(2 * size - 1, width) float32: sines and cosines of the distances size-1 ... -(size-1), interleaved."""
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


class PreLookaheadLayer(nn.Module):
    """Position t sees t-2 ... t+lookahead; zeros beyond both ends."""

    def __init__(self, width: int, channels: int, lookahead: int) -> None:
        super().__init__()
        self.lookahead = lookahead
        self.conv1 = nn.Conv1d(width, channels, kernel_size=lookahead + 1)
        self.conv2 = nn.Conv1d(channels, width, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width)"""
        y = F.pad(x.transpose(1, 2), (0, self.lookahead))
        y = F.leaky_relu(self.conv1(y))
        y = self.conv2(F.pad(y, (2, 0)))
        return x + y.transpose(1, 2)


class CausalUpsample(nn.Module):
    """Repeats each position `ratio` times, then a convolution that sees only the past."""

    def __init__(self, width: int, channels: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv1d(width, channels, kernel_size=2 * ratio + 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, ratio * T, channels)"""
        y = x.transpose(1, 2).repeat_interleave(self.ratio, dim=2)
        return self.conv(F.pad(y, (2 * self.ratio, 0))).transpose(1, 2)


class ConformerBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.output_size
        self.self_attn = RelativeAttention(width, config.attention_heads)
        self.feed_forward = FeedForward(width, config.linear_units)
        self.norm_ff = nn.LayerNorm(width, eps=1e-12)
        self.norm_mha = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, mask)
        return x + self.feed_forward(self.norm_ff(x))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class RelativeAttention(nn.Module):
    """score_ij = ((q_i + u) . k_j + (q_i + v) . W_pos pe(i - j)) / sqrt(head_dim), after Transformer-XL
    (Dai et al. 2019, section 3.3)."""

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

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, T, width); positions: (2T-1, width); mask: bool, broadcasts to (B, 1, T, T)"""
        q, k, v = (self._split(linear(x)) for linear in (self.linear_q, self.linear_k, self.linear_v))
        p = self._split(self.linear_pos(positions)[None])  # (1, heads, 2T-1, head_dim)
        by_distance = (q + self.pos_bias_v[:, None]) @ p.transpose(2, 3)  # (B, heads, T, 2T-1)
        bias = _distance_to_key(by_distance) * q.shape[-1] ** -0.5
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf)
        y = F.scaled_dot_product_attention(q + self.pos_bias_u[:, None], k, v, attn_mask=bias)
        return self.linear_out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, heads, T, head_dim)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _distance_to_key(x: Tensor) -> Tensor:
    """(B, heads, T, 2T-1), column T-1-i+j for distance i-j -> (B, heads, T, T), column j. One more column in
    front makes each row of the reshaped memory start one further to the left."""
    batch, heads, size, columns = x.shape
    x = F.pad(x, (1, 0)).reshape(batch, heads, columns + 1, size)
    return x[:, :, 1:].reshape(batch, heads, size, columns)[..., :size]
