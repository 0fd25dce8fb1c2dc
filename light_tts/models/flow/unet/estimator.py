"""The velocity field of the flow: a causal one-level U-Net of residual convolution and transformer blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.checkpoint.cosyvoice2_config import EstimatorConfig
from light_tts.models.flow.estimator_parts import masked_attention, sinusoids
from light_tts.models.flow.masks import EstimatorMasks, Mask


class Estimator(nn.Module):
    def __init__(self, config: EstimatorConfig, time_embed_dim: int) -> None:
        super().__init__()
        width = config.channels
        self.time_channels = config.in_channels
        self.time_mlp = TimeMLP(config.in_channels, time_embed_dim)

        def resnet(in_channels: int) -> ResnetBlock:
            return ResnetBlock(in_channels, width, time_embed_dim)

        def transformers() -> nn.ModuleList:
            return nn.ModuleList(
                TransformerBlock(width, config.num_heads, config.attention_head_dim)
                for _ in range(config.n_blocks)
            )

        self.down_blocks: Any = nn.ModuleList(
            [nn.ModuleList([resnet(config.in_channels), transformers(), CausalConv1d(width, width, 3)])]
        )
        self.mid_blocks: Any = nn.ModuleList(
            nn.ModuleList([resnet(width), transformers()]) for _ in range(config.num_mid_blocks)
        )
        self.up_blocks: Any = nn.ModuleList(
            [nn.ModuleList([resnet(2 * width), transformers(), CausalConv1d(width, width, 3)])]
        )
        self.final_block = CausalBlock(width, width)
        self.final_proj = nn.Conv1d(width, config.out_channels, kernel_size=1)

    def forward(
        self, x: Tensor, masks: EstimatorMasks, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        """x, mu, cond: (B, 80, T); t: (B,) in [0, 1]; spks: (B, 80). Returns the velocity (B, 80, T)."""
        time = self.time_mlp(sinusoids(t, self.time_channels).to(x.dtype))
        speaker = spks[:, :, None].expand(-1, -1, x.shape[2])
        x = torch.cat([x, mu, speaker, cond], dim=1)  # (B, in_channels, T)

        resnet, transformers, conv = self.down_blocks[0]
        skip = _attend(transformers, resnet(x, masks.frames, time), masks)
        x = conv(skip * masks.frames)
        for resnet, transformers in self.mid_blocks:
            x = _attend(transformers, resnet(x, masks.frames, time), masks)
        resnet, transformers, conv = self.up_blocks[0]
        x = _attend(transformers, resnet(torch.cat([x, skip], dim=1), masks.frames, time), masks)
        x = conv(x * masks.frames)
        x = self.final_block(x, masks.frames)
        return self.final_proj(x * masks.frames) * masks.frames


def _attend(blocks: nn.ModuleList, x: Tensor, masks: EstimatorMasks) -> Tensor:
    """x: (B, channels, T)"""
    x = x.transpose(1, 2)
    for block in blocks:
        x = block(x, masks.attention)
    return x.transpose(1, 2)


class TimeMLP(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class CausalConv1d(nn.Conv1d):
    """Causal: zero-padded on the left."""

    bias: Tensor  # always there

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, channels, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class CausalBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block: Any = nn.Sequential(
            CausalConv1d(in_channels, out_channels, 3),
            nn.Identity(),  # the norm has index 2 in checkpoints
            ChannelNorm(out_channels, eps=1e-5),
            nn.Mish(),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x * mask) * mask


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.mlp: Any = nn.Sequential(nn.Mish(), nn.Linear(time_embed_dim, out_channels))
        self.block1 = CausalBlock(in_channels, out_channels)
        self.block2 = CausalBlock(out_channels, out_channels)
        self.res_conv = nn.Conv1d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """x: (B, in_channels, T); time: (B, time_embed_dim)"""
        h = self.block1(x, mask) + self.mlp(time)[:, :, None]
        return self.block2(h, mask) + self.res_conv(x * mask)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn1 = SelfAttention(width, heads, head_dim)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.ff = GeluFeedForward(width)

    def forward(self, x: Tensor, mask: Mask | None) -> Tensor:
        """x: (B, T, width)"""
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out: Any = nn.Sequential(nn.Linear(inner, width))

    def forward(self, x: Tensor, mask: Mask | None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        y = masked_attention(q, k, v, mask)
        return self.to_out(y.transpose(1, 2).flatten(2))


class GeluFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net: Any = nn.Sequential(
            GeluProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GeluProjection(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))
