"""The flow's encoder on a GPU, from ids to features, in 56 to 76 kernels, suitable for a CUDA graph.

The same arithmetic as encoder.py, over items padded to a common length. What depends on the weights only is
computed once: the embedded tokens, the projected positions, and the upsampling convolution with the linear
layer after it. A convolution over repeated positions is one over the positions themselves, with a sum of its
taps for each of the repetitions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.kernels.flow.layer_norm_linear import fold_layer_norm, layer_norm_linear
from light_tts.kernels.flow.packed_linear import packed_linear, packed_linear_add_
from light_tts.kernels.flow.relative_attention import relative_attention
from light_tts.kernels.flow.row_norm import row_norm
from light_tts.kernels.flow.shifted_linear import shifted_linear
from light_tts.models.flow.encoder import CausalUpsample, ConformerBlock, InputProjection, relative_positions
from light_tts.models.flow.encoder_table import EncoderParts, TableEncoder
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.packed_lookahead import PackedLookahead, Weights

FEW_ROWS = 512  # up to this many positions, fewer kernels are faster: linear layers normalise their input
KEPT_TOKENS = 512  # up to this length, projected positions are computed once


@dataclass(frozen=True)
class Layer:
    """A ConformerBlock."""

    heads: int
    eps: float
    qkv: Weights
    biases: Tensor  # (2, width) float32: u and v, see `relative_attention`
    out: Weights
    up: Weights
    down: Weights
    position: Tensor  # (width, width) float32

    @classmethod
    def of(cls, block: ConformerBlock, dtype: torch.dtype) -> Layer:
        attention, feed = block.self_attn, block.feed_forward
        linears = (attention.linear_q, attention.linear_k, attention.linear_v)
        weight, bias = (torch.cat([getattr(each, name) for each in linears]) for name in ("weight", "bias"))
        biases = torch.stack([attention.pos_bias_u, attention.pos_bias_v]).flatten(1)
        return cls(
            attention.heads,
            block.norm_mha.eps,
            _folded(block.norm_mha, weight, bias, dtype),
            biases.float().contiguous(),
            _plain(attention.linear_out, dtype),
            _folded(block.norm_ff, feed.w_1.weight, feed.w_1.bias, dtype),
            _plain(feed.w_2, dtype),
            attention.linear_pos.weight.float(),
        )

    def positions(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return the projected positions of the distances size-1 ... -(size-1): (2 * size - 1, width)"""
        weight = self.position
        return (relative_positions(size, weight.shape[1], weight.device) @ weight.T).to(dtype)


class Stack:
    """Layers at the same rate. `kept`: number of positions up to which projected ones are computed once."""

    def __init__(self, blocks: nn.ModuleList, kept: int, dtype: torch.dtype) -> None:
        self._layers = [Layer.of(block, dtype) for block in cast(Iterable[ConformerBlock], blocks)]
        self._dtype = dtype
        self._size = kept
        self._kept = [layer.positions(kept, dtype) for layer in self._layers]

    def shortened(self) -> Stack:
        """Return a stack of one layer, for rehearsals."""
        other = copy.copy(self)
        other._layers, other._kept = self._layers[:1], self._kept[:1]
        return other

    def __call__(self, x: Tensor, position: Tensor, items: Tensor) -> None:
        """x: (items * size, width), in place; position: (items * size,); items: (items, 2)"""
        rows, width = x.shape
        size = rows // len(items)
        qkv, attended = x.new_empty(rows, 3 * width), torch.empty_like(x)
        feed = x.new_empty(rows, max((layer.up[0].shape[1] for layer in self._layers), default=0))
        normal = None if rows <= FEW_ROWS else torch.empty_like(x)
        for layer, kept in zip(self._layers, self._kept, strict=True):
            eps = layer.eps
            positions = kept if size <= self._size else layer.positions(size, self._dtype)
            if normal is None:
                layer_norm_linear(x, *layer.qkv, position, qkv, eps)
            else:
                packed_linear(row_norm(x, position, normal, eps), *layer.qkv, position, qkv)
            relative_attention(qkv, positions, layer.biases, items, attended, layer.heads)
            packed_linear_add_(x, attended, *layer.out, position)
            if normal is None:
                layer_norm_linear(x, *layer.up, position, feed, eps, "silu")
            else:
                packed_linear(row_norm(x, position, normal, eps), *layer.up, position, feed, "silu")
            packed_linear_add_(x, feed, *layer.down, position)


class PackedEncoder(TableEncoder):
    """`flow`: with its weights in any type, better float32; `dtype`: type of weights and activations; sums
    and norms are float32. Thread-safe."""

    @torch.inference_mode()
    def __init__(self, flow: Flow, dtype: torch.dtype) -> None:
        encoder = flow.encoder
        super().__init__(flow)
        self._embedded = _embedded(encoder.embed, flow.input_embedding.weight).to(dtype)
        self._lookahead = PackedLookahead(encoder.pre_lookahead_layer, dtype)
        self._tokens = Stack(encoder.encoders, KEPT_TOKENS, dtype)
        linear, norm = _linear_and_norm(encoder.up_embed)
        self._upsampled = _upsampled(encoder.up_layer, linear, dtype)
        scale = encoder.up_embed.scale
        self._up_norm = norm.weight.float() * scale, norm.bias.float() * scale
        self._up_eps = norm.eps
        self._frames = Stack(encoder.up_encoders, self._ratio * KEPT_TOKENS, dtype)
        projection = flow.encoder_proj
        self._projection = _folded(encoder.after_norm, projection.weight, projection.bias, dtype)
        self._eps = encoder.after_norm.eps

    def shortened(self) -> PackedEncoder:
        other = copy.copy(self)
        other._tokens, other._frames = self._tokens.shortened(), self._frames.shortened()
        return other

    def __call__(self, parts: EncoderParts, out: Tensor) -> None:
        height = len(parts.items)
        size = len(parts.ids) // height
        x = self._embedded.index_select(0, parts.ids)
        x = self._lookahead(x, parts.tokens, size)
        self._tokens(x, parts.tokens, parts.items[:, :2])
        y = x.new_empty(len(x), self._upsampled[0].shape[2])
        shifted_linear(x, *self._upsampled, parts.tokens, y, size, 1 - len(self._upsampled[0]))
        y = y.view(self._ratio * len(x), -1)
        row_norm(y, parts.frames, y, self._up_eps, self._up_norm)
        self._frames(y, parts.frames, parts.items[:, 2:])
        layer_norm_linear(y, *self._projection, parts.frames, out, self._eps, target=parts.target)


def _linear_and_norm(embed: InputProjection) -> tuple[nn.Linear, nn.LayerNorm]:
    linear, norm = embed.out
    assert isinstance(linear, nn.Linear) and isinstance(norm, nn.LayerNorm)
    return linear, norm


def _embedded(embed: InputProjection, embedding: Tensor) -> Tensor:
    """Return the projection of each token, and zeros for none: (vocabulary size + 1, width) float32"""
    linear, norm = _linear_and_norm(embed)
    y = F.linear(embedding.float(), linear.weight.float(), linear.bias.float())
    y = F.layer_norm(y, y.shape[1:], norm.weight.float(), norm.bias.float(), norm.eps)
    return F.pad(y * embed.scale, (0, 0, 0, 1))


def _upsampled(up: CausalUpsample, linear: nn.Linear, dtype: torch.dtype) -> Weights:
    """Return weight (3, in, ratio * out) and bias (ratio * out,) of the convolution over repeated positions
    and the linear layer after it, as a convolution over the positions before they are repeated."""
    conv, ratio = up.conv, up.ratio
    assert conv.bias is not None
    taps = torch.einsum("oc,cik->kio", linear.weight.float(), conv.weight.float())
    weight = taps.new_zeros(3, taps.shape[1], ratio, taps.shape[2])
    for repetition in range(ratio):
        for tap, values in enumerate(taps):
            weight[(repetition + tap) // ratio, :, repetition] += values
    bias = linear.weight.float() @ conv.bias.float() + linear.bias.float()
    return weight.flatten(2).to(dtype), bias.repeat(ratio)


def _plain(linear: nn.Linear, dtype: torch.dtype) -> Weights:
    return linear.weight.float().T.contiguous().to(dtype), linear.bias.float()


def _folded(norm: nn.LayerNorm, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Weights:
    weight, bias = fold_layer_norm(norm.weight.float(), norm.bias.float(), weight.float(), bias.float())
    return weight.to(dtype), bias.contiguous()
