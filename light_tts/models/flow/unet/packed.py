"""The estimator on a GPU: one Euler step of a packed batch in 75 to 320 kernels, suitable for a CUDA graph.

The same arithmetic as estimator.py, over the rows of all sequences without padding (see
kernels/flow/packed_conv.py). The batch appears in the rows twice, conditioned and unconditioned. Values that
depend only on the time, which takes ten fixed values, are computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.kernels.flow import resnet_block as resnet_kernel
from light_tts.kernels.flow import transformer_block as transformer_kernel
from light_tts.kernels.flow.euler_step import flow_step
from light_tts.kernels.flow.layer_norm_linear import fold_layer_norm, layer_norm_linear
from light_tts.kernels.flow.packed_attention import packed_attention
from light_tts.kernels.flow.packed_conv import Norm, Residual, Shift, packed_conv
from light_tts.kernels.flow.packed_linear import packed_linear, packed_linear_add_
from light_tts.kernels.flow.resnet_block import ResnetWeights, resnet_block
from light_tts.kernels.flow.transformer_block import BlockWeights, transformer_block
from light_tts.kernels.launch import rows_of_tile
from light_tts.models.flow.estimator_parts import sinusoids
from light_tts.models.flow.packed_rows import PackedRun, Rows
from light_tts.models.flow.page_store import COPIES, PageLimits, PageStore
from light_tts.models.flow.unet.estimator import (
    CausalBlock,
    Estimator,
    ResnetBlock,
    TransformerBlock,
)

T = TypeVar("T")

EDGE = 2  # number of preceding frames that a convolution reads
FEW_ROWS = 1024  # up to this many frames, fewer and smaller kernels are faster (see packed_linear)


@dataclass(frozen=True)
class UNetBuffers:
    """Implements `Buffers`."""

    x: Tensor
    inputs: Tensor
    hidden: tuple[Tensor, Tensor, Tensor]  # (2 rows, width)
    joined: Tensor  # (2 rows, 2 width): input of the up block, with the skip connection in the second half
    qkv: Tensor  # (2 rows, 3 inner)
    attended: Tensor  # (2 rows, inner)
    feed: Tensor  # (2 rows, 4 width)
    normal: Tensor | None  # (2 rows, width); None for few rows, see packed_linear
    next_qkv: Tensor | None  # (2 rows, 3 inner); None: a transformer block is computed in five kernels

    def first(self, rows: int, few: bool, joined: bool = False) -> UNetBuffers:
        """Return the first part of these buffers, for fewer frames. `joined`: a transformer block is computed
        in one kernel; `few`: if it is not, without `normal`."""
        both = COPIES * rows
        return UNetBuffers(
            x=self.x[:rows],
            inputs=self.inputs[:both],
            hidden=(self.hidden[0][:both], self.hidden[1][:both], self.hidden[2][:both]),
            joined=self.joined[:both],
            qkv=self.qkv[:both],
            attended=self.attended[:both],
            feed=self.feed[:both],
            normal=None if (few and not joined) or self.normal is None else self.normal[:both],
            next_qkv=self.next_qkv[:both] if joined and self.next_qkv is not None else None,
        )


UNetRun = PackedRun[UNetBuffers]


@dataclass(frozen=True)
class Conv:
    weight: Tensor  # (taps, in, out)
    bias: Tensor

    @classmethod
    def of(cls, conv: nn.Conv1d, dtype: torch.dtype) -> Conv:
        assert conv.bias is not None  # all convolutions of the estimator have one
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
    shift: Tensor  # (steps, width) float32: contribution of the time
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

    def joined(self, qkv: tuple[Tensor, Tensor]) -> ResnetWeights:
        """Return the weights of this block with the queries, keys and values after it."""
        first, second, side = self.first, self.second, self.side
        return ResnetWeights(
            (first.conv.weight, first.conv.bias),
            first.norm,
            self.shift,
            (second.conv.weight, second.conv.bias),
            second.norm,
            (side.weight[0], side.bias),
            qkv,
        )

    def __call__(self, run: UNetRun, x: Tensor, between: Tensor, out: Tensor, eps: float) -> Tensor:
        """x: (2 rows, in) -> out: (2 rows, width); `eps`: of the following norm"""
        rows, position = run.rows, run.rows.position
        first, second = self.first, self.second
        packed_conv(
            x,
            first.conv.weight,
            first.conv.bias,
            position,
            between,
            first.norm,
            Shift(self.shift, rows.step),
            cached=run.edges(),
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
            cached=run.edges(),
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

    def __call__(self, run: UNetRun, x: Tensor, has_qkv: bool = False) -> None:
        """x: (2 rows, width), in place; `has_qkv`: queries, keys and values have been computed"""
        rows, position, normal = run.rows, run.rows.position, run.rows.buffers.normal
        if has_qkv:
            pass
        elif normal is None:
            layer_norm_linear(x, *self.qkv, position, rows.buffers.qkv, self.eps)
        else:
            packed_linear(normal, *self.qkv, position, rows.buffers.qkv)
        packed_attention(
            rows.buffers.qkv,
            rows.blocks,
            rows.buffers.attended,
            self.heads,
            rows.block_rows,
            COPIES,
            run.keys(),
        )
        packed_linear_add_(x, rows.buffers.attended, *self.out, position, normal, self.eps)
        if normal is None:
            layer_norm_linear(x, *self.up, position, rows.buffers.feed, self.eps, activation="gelu")
        else:
            packed_linear(normal, *self.up, position, rows.buffers.feed, activation="gelu")
        packed_linear_add_(x, rows.buffers.feed, *self.down, position, normal, self.eps)


@dataclass(frozen=True)
class UNetStage:
    """A residual block followed by transformer blocks."""

    resnet: Resnet
    blocks: list[Transformer]
    joined: list[BlockWeights]  # of the blocks, each with the beginning of the next one
    head: ResnetWeights  # of the residual block, with the beginning of the first one

    @classmethod
    def of(
        cls, resnet: Resnet, blocks: list[Transformer], dtype: torch.dtype, device: torch.device
    ) -> UNetStage:
        followers = [block.qkv for block in blocks[1:]]
        joined = [
            BlockWeights(block.heads, block.out, block.up, block.down, follower)
            for block, follower in zip(blocks, [*followers, None], strict=True)
        ]
        inner, width = blocks[0].out[0].shape
        head = resnet.joined(blocks[0].qkv)
        if transformer_kernel.computes(device, dtype, width, blocks[0].heads, inner):
            joined = [weights.pack() for weights in joined]
            if resnet_kernel.computes(device, dtype, head):
                head = head.pack()
        return cls(resnet, blocks, joined, head)

    def shortened(self) -> UNetStage:
        """Return this stage with only the first and the last of its transformer blocks."""
        return replace(self, blocks=_ends(self.blocks), joined=_ends(self.joined))

    def __call__(self, run: UNetRun, x: Tensor, between: Tensor, out: Tensor, first: bool = False) -> Tensor:
        """x: (2 rows, in) -> out: (2 rows, width); `first`: of the step"""
        rows, qkv, eps = run.rows, run.rows.buffers.qkv, self.blocks[0].eps
        if rows.tile_rows is not None:  # with the first queries, keys and values
            edges, other = run.edges(), run.edges()
            cached = None if edges is None or other is None else (edges, other)
            lines, tile_rows = rows.lines, rows.tile_rows
            resnet_block(x, out, qkv, self.head, lines, tile_rows, COPIES, rows.step, cached, eps, first)
        else:
            self.resnet(run, x, between, out, eps)
        next_qkv = rows.buffers.next_qkv
        if next_qkv is None:
            for index, block in enumerate(self.blocks):
                block(run, out, has_qkv=index == 0 and rows.tile_rows is not None)
            return out
        if rows.tile_rows is None:
            assert rows.buffers.normal is not None  # see UNetBuffers
            packed_linear(rows.buffers.normal, *self.blocks[0].qkv, rows.position, qkv)
        for weights in self.joined:
            transformer_block(
                out, qkv, next_qkv, weights, rows.queries, rows.block_rows, COPIES, run.keys(), eps
            )
            qkv, next_qkv = next_qkv, qkv
        return out


class PackedEstimator:
    """Implements `StepEstimator`. `steps`: (t, dt) of each Euler step; `guidance`: strength of
    classifier-free guidance; `dtype`: type of weights and activations; sums, norms and the integration state
    are float32."""

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

        def stage(resnet: ResnetBlock, blocks: Sequence[TransformerBlock]) -> UNetStage:
            packed = [Transformer.of(block, dtype) for block in blocks]
            return UNetStage.of(Resnet.of(resnet, times, dtype), packed, dtype, device)

        resnet, blocks, conv = estimator.down_blocks[0]
        self._down, self._down_conv = stage(resnet, blocks), Conv.of(conv, dtype)
        self._mid = [stage(*pair) for pair in estimator.mid_blocks]
        resnet, blocks, conv = estimator.up_blocks[0]
        self._up, self._up_conv = stage(resnet, blocks), Conv.of(conv, dtype)
        self._stages = [self._down, *self._mid, self._up]
        self._final = ConvBlock.of(estimator.final_block, dtype)
        projection = Conv.of(estimator.final_proj, dtype)
        self._projection = projection.weight[0].contiguous(), projection.bias
        self._inner = self._down.blocks[0].out[0].shape[0]

    def shortened(self) -> PackedEstimator:
        """Without the stages and blocks between others of the same sizes."""
        other = copy.copy(self)
        other._down, other._up = self._down.shortened(), self._up.shortened()
        other._mid = [stage.shortened() for stage in _ends(self._mid)]
        return other

    def step(self, rows: Rows[UNetBuffers]) -> None:
        width, run = self._width, PackedRun(rows)
        joined, skip = rows.buffers.joined[:, :width], rows.buffers.joined[:, width:]
        a, b, between = rows.buffers.hidden

        def conv(x: Tensor, conv: Conv, out: Tensor, norm: Norm | None = None) -> Tensor:
            return packed_conv(x, conv.weight, conv.bias, rows.position, out, norm, cached=run.edges())

        x = self._down(run, rows.buffers.inputs, between, skip, first=True)
        x, other = conv(x, self._down_conv, a), b
        for index, stage in enumerate(self._mid):
            target = joined if index == len(self._mid) - 1 else other
            x, other = stage(run, x, between, target), x
        x = self._up(run, rows.buffers.joined, between, a)
        x = conv(x, self._up_conv, b)
        x = conv(x, self._final.conv, a, self._final.norm)
        weight, bias = self._projection
        flow_step(
            x,
            weight,
            bias,
            self._guidance,
            self._dt,
            rows.step,
            rows.position,
            rows.buffers.x,
            rows.buffers.inputs,
        )
        rows.step.add_(1)

    def keep(self, room: int, frames: int, limits: PageLimits) -> PageStore:
        stages = self._stages
        convs = [conv for stage in stages for conv in (stage.resnet.first.conv, stage.resnet.second.conv)]
        convs = [*convs[:2], self._down_conv, *convs[2:], self._up_conv, self._final.conv]
        inputs = [conv.weight.shape[1] for conv in convs]
        layers = sum(len(stage.blocks) for stage in stages)
        return PageStore(
            room, frames, self.steps, layers, self._inner, EDGE, inputs, self.dtype, self.device, limits
        )

    def rows_of_tile(self, rows: int) -> int | None:
        if self._down.joined[0].packed is None:
            return None
        return rows_of_tile("transformer_block", self.device, self.dtype, rows)

    def rows_of_resnet_tile(self, rows: int) -> int | None:
        if any(stage.head.packed is None for stage in self._stages):
            return None
        return rows_of_tile("resnet_block", self.device, self.dtype, rows)

    def allocate(self, rows: int) -> UNetBuffers:
        width, device = self._width, self.device

        def matrix(columns: int) -> Tensor:
            return torch.zeros(COPIES * rows, columns, dtype=self.dtype, device=device)

        return UNetBuffers(
            x=torch.zeros(rows, self.mels, device=device),
            inputs=matrix(self._inputs),
            hidden=(matrix(width), matrix(width), matrix(width)),
            joined=matrix(2 * width),
            qkv=matrix(3 * self._inner),
            attended=matrix(self._inner),
            feed=matrix(4 * width),
            normal=matrix(width),
            next_qkv=matrix(3 * self._inner),
        )

    def part(self, buffers: UNetBuffers, rows: int) -> UNetBuffers:
        return buffers.first(rows, rows <= FEW_ROWS, joined=self.rows_of_tile(COPIES * rows) is not None)


def _ends(parts: list[T]) -> list[T]:
    """Return the first and the last one."""
    return parts if len(parts) < 2 else [parts[0], parts[-1]]


def _time_embedding(estimator: Estimator, times: Tensor) -> Tensor:
    """times: (steps,) -> (steps, time_embed_dim) float32"""
    first, second = estimator.time_mlp.linear_1, estimator.time_mlp.linear_2
    hidden = F.linear(sinusoids(times, estimator.time_channels), first.weight.float(), first.bias.float())
    return F.linear(F.silu(hidden), second.weight.float(), second.bias.float())
