"""The velocity field of the flow: a diffusion transformer (Peebles & Xie 2023), whose blocks are modulated by
the time, after two causal convolutions in place of a positional encoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.checkpoint.cosyvoice3_config import DiTConfig
from light_tts.models.flow.chunk_estimator import ChunkRun
from light_tts.models.flow.estimator_parts import masked_attention, sinusoids
from light_tts.models.flow.masks import EstimatorMasks, Mask

TIME_CHANNELS = 256
GROUPS, KERNEL = 16, 31  # of the convolutions
NORM_EPS = 1e-6


class DiT(nn.Module):
    """`mels`: channels of the mel spectrogram."""

    def __init__(self, config: DiTConfig, mels: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(config.dim)
        self.input_embed = InputEmbedding(4 * mels, config.dim)
        self.rotary_embed = RotaryEmbedding(config.dim_head)
        self.transformer_blocks: Any = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm_out = FinalModulation(config.dim)
        self.proj_out = nn.Linear(config.dim, mels)

    def forward(
        self, x: Tensor, masks: EstimatorMasks, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        """x, mu, cond: (B, 80, T); t: (B,) in [0, 1]; spks: (B, 80). Returns the velocity (B, 80, T), in
        which frames without data are undefined."""
        time = self.time_embed(t)
        speaker = spks[:, :, None].expand(-1, -1, x.shape[2])
        x = self.input_embed(torch.cat([x, cond, mu, speaker], dim=1).transpose(1, 2))
        rotation = self.rotary_embed(0, x.shape[1])
        for block in self.transformer_blocks:
            x = block(x, block.attn_norm(time), rotation, masks.attention)
        return self.proj_out(modulated(x, *self.norm_out(time))).transpose(1, 2)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_mlp: Any = nn.Sequential(
            nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, width)"""
        return self.time_mlp(sinusoids(t, TIME_CHANNELS).to(self.time_mlp[0].weight.dtype))


class InputEmbedding(nn.Module):
    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, width)
        self.conv_pos_embed = PositionalConvs(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in_channels) -> (B, T, width)"""
        x = self.proj(x)
        return x + self.conv_pos_embed(x)


class PositionalConvs(nn.Module):
    """Two causal convolutions, which are zero-padded on the left, each followed by Mish."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1: Any = nn.Sequential(nn.Conv1d(width, width, KERNEL, groups=GROUPS), nn.Mish())
        self.conv2: Any = nn.Sequential(nn.Conv1d(width, width, KERNEL, groups=GROUPS), nn.Mish())

    def forward(self, x: Tensor, run: ChunkRun | None = None) -> Tensor:
        """x: (B, T, width); `run`: has the inputs of the convolutions before the first frame."""
        for conv in (self.conv1, self.conv2):
            x = F.pad(x, (0, 0, KERNEL - 1, 0))
            if run is not None:
                x = run.join(x)
            x = conv(x.transpose(1, 2)).transpose(1, 2)
        return x


class Rotation(NamedTuple):
    """Cosines and sines of the angles at some positions: (T, dim_head), equal in pairs."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> the same with the first dim_head channels rotated in pairs (2k, 2k + 1)."""
        first, rest = x.split([self.cos.shape[1], x.shape[2] - self.cos.shape[1]], dim=2)
        even, odd = first[..., ::2], first[..., 1::2]
        turned = torch.stack([-odd, even], dim=-1).flatten(2)
        return torch.cat([first * self.cos + turned * self.sin, rest], dim=2)


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim_head: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(dim_head // 2))

    def forward(self, start: int, end: int) -> Rotation:
        """Return the rotation at the positions [start, end)."""
        position = torch.arange(start, end, device=self.inv_freq.device)
        angle = (position[:, None] * self.inv_freq).repeat_interleave(2, dim=1)
        return Rotation(angle.cos(), angle.sin())


class Modulation(NamedTuple):
    """Shift, scale and gate of a block's attention and of its feed-forward layer, which depend on the time:
    each (B, 1, width), or (width,) for all items."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    feed_shift: Tensor
    feed_scale: Tensor
    feed_gate: Tensor


class DiTBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attn_norm = BlockModulation(config.dim)
        self.attn = DiTAttention(config)
        self.ff = FeedForward(config.dim, config.ff_mult * config.dim)

    def forward(
        self, x: Tensor, by: Modulation, rotation: Rotation, mask: Mask | None, run: ChunkRun | None = None
    ) -> Tensor:
        """x: (B, T, width); `run`: has the keys and values of the frames before these."""
        x = x + by.gate * self.attn(modulated(x, by.scale, by.shift), rotation, mask, run)
        return x + by.feed_gate * self.ff(modulated(x, by.feed_scale, by.feed_shift))


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x: (B, T, width); scale, shift: (B, 1, width)"""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class BlockModulation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(Modulation._fields) * width)

    def forward(self, time: Tensor) -> Modulation:
        """time: (B, width)"""
        return Modulation(*self.linear(F.silu(time))[:, None].chunk(len(Modulation._fields), dim=2))


class FinalModulation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """time: (B, width) -> scale, shift: (B, 1, width) each"""
        scale, shift = self.linear(F.silu(time))[:, None].chunk(2, dim=2)
        return scale, shift


class DiTAttention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.dim_head
        self.to_q = nn.Linear(config.dim, inner)
        self.to_k = nn.Linear(config.dim, inner)
        self.to_v = nn.Linear(config.dim, inner)
        self.to_out: Any = nn.Sequential(nn.Linear(inner, config.dim))

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask | None, run: ChunkRun | None) -> Tensor:
        """x: (B, T, width). The released models were trained with only the first head rotated."""
        q, k, v = rotation(self.to_q(x)), rotation(self.to_k(x)), self.to_v(x)
        if run is not None:
            k, v = run.all_keys(k, v)
        q, k, v = (rows.unflatten(2, (self.heads, -1)).transpose(1, 2) for rows in (q, k, v))
        return self.to_out(masked_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ff: Any = nn.Sequential(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh")),
            nn.Identity(),  # the second layer has index 2 in checkpoints
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)
