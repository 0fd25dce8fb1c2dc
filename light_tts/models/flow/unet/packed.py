"""The estimator on a GPU: one Euler step of a packed batch in about 320 kernels, ready to be a CUDA graph.

The same arithmetic as estimator.py, over the rows of all sequences without padding (see
kernels/flow/packed_conv.py). The batch stands in the rows twice, conditioned and not. What depends on the
time alone, which takes ten fixed values, is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.kernels.flow.euler_step import flow_step
from light_tts.kernels.flow.packed_attention import packed_attention
from light_tts.kernels.flow.packed_conv import Norm, Residual, packed_conv
from light_tts.kernels.flow.packed_linear import (
    fold_layer_norm,
    layer_norm_linear,
    linear,
    packed_linear_add_,
)
from light_tts.models.flow.unet.estimator import (
    CausalBlock,
    Estimator,
    ResnetBlock,
    TransformerBlock,
    sinusoids,
)

COPIES = 2  # with and without guidance
ALIGNMENT = 4  # int32 values: 16 bytes

Table = TypeVar("Table", Tensor, np.ndarray)


@dataclass(frozen=True)
class Buffers:
    """What a step computes with, for some number of frames (rows), COPIES times.

    x: (rows, mels) float32, the state of the integration; inputs: (2 rows, estimator input).
    """

    x: Tensor
    inputs: Tensor
    hidden: tuple[Tensor, Tensor, Tensor]  # (2 rows, width)
    joined: Tensor  # (2 rows, 2 width): what the up block reads, its skip in the second half
    qkv: Tensor  # (2 rows, 3 inner)
    attended: Tensor  # (2 rows, inner)
    feed: Tensor  # (2 rows, 4 width)
    normal: Tensor | None  # (2 rows, width); None: see packed_linear, few rows

    def first(self, rows: int, few: bool) -> Buffers:
        """The beginning of these, for fewer frames. `few`: without `normal`."""
        both = COPIES * rows
        return Buffers(
            x=self.x[:rows],
            inputs=self.inputs[:both],
            hidden=tuple(tensor[:both] for tensor in self.hidden),
            joined=self.joined[:both],
            qkv=self.qkv[:both],
            attended=self.attended[:both],
            feed=self.feed[:both],
            normal=None if few else self.normal[:both],
        )


class Rows:
    """Buffers, and a table on the device that says what lies in their rows: `step`, (1,) int32; `position`,
    (2 rows,) int32, -1 without meaning; `blocks`, see packed_attention. All three are parts of `table`, so
    that one copy brings them up to date."""

    def __init__(self, buffers: Buffers, blocks: int, block_rows: int) -> None:
        """`blocks`: most of them, of `block_rows` queries each. No row has a meaning yet."""
        self.buffers = buffers
        self.block_rows = block_rows
        self._positions = COPIES * self.size
        entries = ALIGNMENT + self._positions + 4 * blocks
        self.table = torch.zeros(entries, dtype=torch.int32, device=buffers.x.device)
        self.step, self.position, self.blocks = self.parts(self.table)
        self.clear()

    @property
    def size(self) -> int:
        return len(self.buffers.x)

    def parts(self, table: Table) -> tuple[Table, Table, Table]:
        """Step, position and blocks of a table of this layout: views."""
        blocks = table[ALIGNMENT + self._positions :]
        return table[:1], table[ALIGNMENT : ALIGNMENT + self._positions], blocks.reshape(-1, 4)

    def clear(self) -> None:
        """No row has a meaning; step 0."""
        self.table.zero_()
        self.position.fill_(-1)


@dataclass(frozen=True)
class Conv:
    weight: Tensor  # (taps, in, out)
    bias: Tensor

    @classmethod
    def of(cls, conv: nn.Conv1d, dtype: torch.dtype) -> Conv:
        return cls(conv.weight.float().permute(2, 1, 0).contiguous().to(dtype), conv.bias.float())


@dataclass(frozen=True)
class ConvBlock:
    conv: Conv
    norm: Norm

    @classmethod
    def of(cls, block: CausalBlock, dtype: torch.dtype) -> ConvBlock:
        conv, _, norm, _ = block.block
        return cls(Conv.of(conv, dtype), Norm(norm.weight.float(), norm.bias.float(), norm.eps))


@dataclass(frozen=True)
class Resnet:
    first: ConvBlock
    shift: Tensor  # (steps, width) float32: what the time adds
    second: ConvBlock
    side: Conv

    @classmethod
    def of(cls, block: ResnetBlock, times: Tensor, dtype: torch.dtype) -> Resnet:
        """times: (steps, time_embed_dim) float32"""
        linear = block.mlp[1]
        shift = F.linear(F.mish(times), linear.weight.float(), linear.bias.float())
        return cls(
            ConvBlock.of(block.block1, dtype),
            shift.contiguous(),
            ConvBlock.of(block.block2, dtype),
            Conv.of(block.res_conv, dtype),
        )

    def __call__(self, rows: Rows, x: Tensor, between: Tensor, out: Tensor, eps: float) -> Tensor:
        """x: (2 rows, in) -> out: (2 rows, width); `eps`: of the norm that follows"""
        position = rows.position
        first, second = self.first, self.second
        packed_conv(
            x, first.conv.weight, first.conv.bias, position, between, first.norm, self.shift, rows.step
        )
        side = Residual(x, self.side.weight[0], self.side.bias)
        return packed_conv(
            between,
            second.conv.weight,
            second.conv.bias,
            position,
            out,
            second.norm,
            residual=side,
            normal=rows.buffers.normal,
            eps=eps,
        )


@dataclass(frozen=True)
class Transformer:
    heads: int
    eps: float
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, block: TransformerBlock, dtype: torch.dtype) -> Transformer:
        attention, feed = block.attn1, block.ff.net

        def folded(norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            bias = bias if bias is None else bias.float()
            weight, bias = fold_layer_norm(norm.weight.float(), norm.bias.float(), weight.float(), bias)
            return weight.to(dtype), bias.contiguous()

        def plain(linear: nn.Linear) -> tuple[Tensor, Tensor]:
            return linear.weight.float().T.contiguous().to(dtype), linear.bias.float()

        projections = (attention.to_q, attention.to_k, attention.to_v)
        return cls(
            attention.heads,
            block.norm1.eps,
            folded(block.norm1, torch.cat([linear.weight for linear in projections]), None),
            plain(attention.to_out[0]),
            folded(block.norm3, feed[0].proj.weight, feed[0].proj.bias),
            plain(feed[2]),
        )

    def __call__(self, rows: Rows, x: Tensor) -> None:
        """x: (2 rows, width), in place"""
        position, normal = rows.position, rows.buffers.normal
        if normal is None:
            layer_norm_linear(x, *self.qkv, position, rows.buffers.qkv, self.eps, gelu=False)
        else:
            linear(normal, *self.qkv, position, rows.buffers.qkv, gelu=False)
        packed_attention(
            rows.buffers.qkv, rows.blocks, rows.buffers.attended, self.heads, rows.block_rows, COPIES
        )
        packed_linear_add_(x, rows.buffers.attended, *self.out, position, normal, self.eps)
        if normal is None:
            layer_norm_linear(x, *self.up, position, rows.buffers.feed, self.eps, gelu=True)
        else:
            linear(normal, *self.up, position, rows.buffers.feed, gelu=True)
        packed_linear_add_(x, rows.buffers.feed, *self.down, position, normal, self.eps)


@dataclass(frozen=True)
class Stage:
    """A residual block and transformer blocks over its result."""

    resnet: Resnet
    blocks: list[Transformer]

    def __call__(self, rows: Rows, x: Tensor, between: Tensor, out: Tensor) -> Tensor:
        x = self.resnet(rows, x, between, out, self.blocks[0].eps)
        for block in self.blocks:
            block(rows, x)
        return x


class PackedEstimator:
    """`steps`: (t, dt) of each Euler step; `guidance`: of classifier-free guidance; `dtype`: of weights and
    activations; sums, norms and the state of the integration are float32."""

    def __init__(
        self,
        estimator: Estimator,
        steps: Sequence[tuple[float, float]],
        guidance: float,
        dtype: torch.dtype,
    ) -> None:
        device = estimator.final_proj.weight.device
        self.dtype = dtype
        self.device = device
        self.steps = len(steps)
        self.mels = estimator.final_proj.out_channels
        self._guidance = guidance
        self._width = estimator.final_proj.in_channels
        self._inputs = estimator.time_channels
        times = torch.tensor([t for t, _ in steps], device=device)
        self._dt = torch.tensor([dt for _, dt in steps], device=device)
        times = _time_embedding(estimator, times)

        def stage(resnet: ResnetBlock, blocks: nn.ModuleList) -> Stage:
            return Stage(Resnet.of(resnet, times, dtype), [Transformer.of(block, dtype) for block in blocks])

        resnet, blocks, conv = estimator.down_blocks[0]
        self._down, self._down_conv = stage(resnet, blocks), Conv.of(conv, dtype)
        self._mid = [stage(*pair) for pair in estimator.mid_blocks]
        resnet, blocks, conv = estimator.up_blocks[0]
        self._up, self._up_conv = stage(resnet, blocks), Conv.of(conv, dtype)
        self._final = ConvBlock.of(estimator.final_block, dtype)
        projection = Conv.of(estimator.final_proj, dtype)
        self._projection = projection.weight[0].contiguous(), projection.bias
        self._inner = self._down.blocks[0].out[0].shape[0]

    def step(self, rows: Rows) -> None:
        """One Euler step: moves x on, also in the inputs, and adds 1 to `rows.step`."""
        width, position = self._width, rows.position
        joined, skip = rows.buffers.joined[:, :width], rows.buffers.joined[:, width:]
        a, b, between = rows.buffers.hidden

        x = self._down(rows, rows.buffers.inputs, between, skip)
        x, other = packed_conv(x, self._down_conv.weight, self._down_conv.bias, position, a), b
        for index, stage in enumerate(self._mid):
            target = joined if index == len(self._mid) - 1 else other
            x, other = stage(rows, x, between, target), x
        x = self._up(rows, rows.buffers.joined, between, a)
        x = packed_conv(x, self._up_conv.weight, self._up_conv.bias, position, b)
        x = packed_conv(x, self._final.conv.weight, self._final.conv.bias, position, a, self._final.norm)
        weight, bias = self._projection
        flow_step(
            x,
            weight,
            bias,
            self._guidance,
            self._dt,
            rows.step,
            position,
            rows.buffers.x,
            rows.buffers.inputs,
        )
        rows.step.add_(1)

    def allocate(self, rows: int) -> Buffers:
        """For `rows` frames."""
        width, device = self._width, self.device

        def matrix(columns: int) -> Tensor:
            return torch.zeros(COPIES * rows, columns, dtype=self.dtype, device=device)

        return Buffers(
            x=torch.zeros(rows, self.mels, device=device),
            inputs=matrix(self._inputs),
            hidden=(matrix(width), matrix(width), matrix(width)),
            joined=matrix(2 * width),
            qkv=matrix(3 * self._inner),
            attended=matrix(self._inner),
            feed=matrix(4 * width),
            normal=matrix(width),
        )


def _time_embedding(estimator: Estimator, times: Tensor) -> Tensor:
    """times: (steps,) -> (steps, time_embed_dim) float32"""
    first, second = estimator.time_mlp.linear_1, estimator.time_mlp.linear_2
    hidden = F.linear(sinusoids(times, estimator.time_channels), first.weight.float(), first.bias.float())
    return F.linear(F.silu(hidden), second.weight.float(), second.bias.float())
