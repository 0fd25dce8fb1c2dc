"""The diffusion transformer on a GPU: one Euler step of a packed batch, with 22 blocks in 160 kernels,
suitable for a CUDA graph.

The same arithmetic as estimator.py, over the rows of all sequences without padding (see
kernels/flow/packed_conv.py). The batch appears in the rows twice, conditioned and unconditioned. What depends
only on the time is computed once (see timed.py).

The official documentation warns of float16 for this model. So the residual stream, norms, modulation, sums
and the integration state are float32, and only what is multiplied by matrices is in the type of the weights:
these, normed inputs, queries, keys and values, attended values and the hidden layer. In float16 they have the
10 bits of mantissa that TF32 has, so products are rounded as in TF32, except that numbers below 6e-5 lose
bits; those above 65504 become 65504, not infinite.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from light_tts.kernels.flow.euler_step import flow_step
from light_tts.kernels.flow.grouped_conv import grouped_conv
from light_tts.kernels.flow.modulated_norm import modulated_norm
from light_tts.kernels.flow.packed_attention import packed_attention
from light_tts.kernels.flow.packed_linear import (
    Gate,
    Rotary,
    packed_linear,
    packed_linear_add_,
    rotary_table,
)
from light_tts.models.checkpoint.config import MAX_FRAMES
from light_tts.models.flow.dit.estimator import GROUPS, KERNEL, NORM_EPS, DiT, DiTBlock
from light_tts.models.flow.dit.timed import TimedDiT
from light_tts.models.flow.packed_rows import PackedRun, Rows
from light_tts.models.flow.page_store import COPIES, PageLimits, PageStore

Weights = tuple[Tensor, Tensor]  # (in, out), and (out,) float32


@dataclass(frozen=True)
class DiTBuffers:
    """Implements `Buffers`."""

    x: Tensor
    inputs: Tensor
    stream: Tensor  # (2 rows, width) float32: the residual stream
    normal: Tensor  # (2 rows, width): its norm; first the result of the first convolution
    qkv: Tensor  # (2 rows, 3 width)
    attended: Tensor  # (2 rows, width)
    feed: Tensor  # (2 rows, hidden)


DiTRun = PackedRun[DiTBuffers]


@dataclass(frozen=True)
class Modulated:
    """The parameters of a layer that depend on the time, float32. modulation: (steps, 2, width), shift and
    scale of its input; gate: (steps, width), of its result."""

    modulation: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Block:
    """A DiTBlock."""

    heads: int
    attention: Modulated
    qkv: Weights
    out: Weights
    feed: Modulated
    up: Weights
    down: Weights

    @classmethod
    def of(cls, block: DiTBlock, by: Tensor, dtype: torch.dtype) -> Block:
        """by: (steps, 6, width) float32, see Modulation"""
        attention, (entry, _, down) = block.attn, block.ff.ff
        return cls(
            attention.heads,
            Modulated(by[:, :2], by[:, 2]),
            _linear([attention.to_q, attention.to_k, attention.to_v], dtype),
            _linear([attention.to_out[0]], dtype),
            Modulated(by[:, 3:5], by[:, 5]),
            _linear([entry[0]], dtype),
            _linear([down], dtype),
        )

    def __call__(self, run: DiTRun, rotation: Rotary) -> None:
        rows, position, step, buffers = run.rows, run.rows.position, run.rows.step, run.rows.buffers
        x, normal = buffers.stream, buffers.normal
        modulated_norm(x, self.attention.modulation, step, position, normal, NORM_EPS)
        packed_linear(normal, *self.qkv, position, buffers.qkv, rotation=rotation)
        attended = buffers.attended
        packed_attention(buffers.qkv, rows.blocks, attended, self.heads, rows.block_rows, COPIES, run.keys())
        packed_linear_add_(x, attended, *self.out, position, gate=Gate(self.attention.gate, step))
        modulated_norm(x, self.feed.modulation, step, position, normal, NORM_EPS)
        packed_linear(normal, *self.up, position, buffers.feed, activation="gelu_tanh")
        packed_linear_add_(x, buffers.feed, *self.down, position, gate=Gate(self.feed.gate, step))


class PackedDiT:
    """Implements `StepEstimator`. `steps`: (t, dt) of each Euler step; `guidance`: strength of
    classifier-free guidance; `dtype`: type of what is multiplied by matrices."""

    @torch.inference_mode()
    def __init__(
        self, estimator: DiT, steps: Sequence[tuple[float, float]], guidance: float, dtype: torch.dtype
    ) -> None:
        device = estimator.proj_out.weight.device
        self.dtype = dtype
        self.device = device
        self.steps = len(steps)
        self.mels = estimator.proj_out.out_features
        self._width = estimator.proj_out.in_features
        self._guidance = guidance
        self._dt = torch.tensor([dt for _, dt in steps], device=device)
        timed = TimedDiT.of(estimator, [t for t, _ in steps])
        embedding = estimator.input_embed
        entry = torch.cat([timed.of_x, timed.of_given], dim=1)  # in the order of `fill_rows`
        self._entry = entry.T.contiguous().to(dtype), embedding.proj.bias.float()
        convs = embedding.conv_pos_embed
        self._convs = [_taps(conv[0], dtype) for conv in (convs.conv1, convs.conv2)]
        self._blocks = [
            Block.of(block, timed.blocks[:, index].float(), dtype)
            for index, block in enumerate(estimator.transformer_blocks)
        ]
        self._final = timed.final.flip(1).float().contiguous()  # shift and scale
        self._projection = _linear([estimator.proj_out], dtype)
        self._rotation = rotary_table(estimator.rotary_embed.inv_freq, MAX_FRAMES)

    def shortened(self) -> PackedDiT:
        """With one block."""
        other = copy.copy(self)
        other._blocks = self._blocks[:1]
        return other

    def step(self, rows: Rows[DiTBuffers]) -> None:
        run, buffers, position = PackedRun(rows), rows.buffers, rows.position
        x, between = buffers.stream, buffers.normal
        packed_linear(buffers.inputs, *self._entry, position, x)
        first, second = self._convs
        grouped_conv(x, *first, position, between, cached=run.edges())
        grouped_conv(between, *second, position, x, residual=x, cached=run.edges())
        dim = self._rotation.shape[1]
        rotation = Rotary(rows.fill[0], self._rotation, (0, self._width), dim)  # of the first head only
        for block in self._blocks:
            block(run, rotation)
        modulated_norm(x, self._final, rows.step, position, buffers.normal, NORM_EPS)
        flow_step(
            buffers.normal,
            *self._projection,
            self._guidance,
            self._dt,
            rows.step,
            position,
            buffers.x,
            buffers.inputs,
        )
        rows.step.add_(1)

    def keep(self, room: int, frames: int, limits: PageLimits) -> PageStore:
        layers, width, inputs = len(self._blocks), self._width, [self._width] * len(self._convs)
        return PageStore(
            room, frames, self.steps, layers, width, KERNEL - 1, inputs, self.dtype, self.device, limits
        )

    def rows_of_tile(self, rows: int) -> None:
        """Blocks are computed in several kernels."""

    def rows_of_resnet_tile(self, rows: int) -> None:
        """There are no residual blocks."""

    def allocate(self, rows: int) -> DiTBuffers:
        def matrix(columns: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(COPIES * rows, columns, dtype=dtype, device=self.device)

        return DiTBuffers(
            x=torch.zeros(rows, self.mels, device=self.device),
            inputs=matrix(4 * self.mels),
            stream=matrix(self._width, torch.float32),
            normal=matrix(self._width),
            qkv=matrix(3 * self._width),
            attended=matrix(self._width),
            feed=matrix(self._blocks[0].up[0].shape[1]),
        )

    def part(self, buffers: DiTBuffers, rows: int) -> DiTBuffers:
        both = COPIES * rows
        return DiTBuffers(
            x=buffers.x[:rows],
            inputs=buffers.inputs[:both],
            stream=buffers.stream[:both],
            normal=buffers.normal[:both],
            qkv=buffers.qkv[:both],
            attended=buffers.attended[:both],
            feed=buffers.feed[:both],
        )


def _linear(layers: Sequence[nn.Linear], dtype: torch.dtype) -> Weights:
    """Return the layers side by side."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return weight.T.contiguous().to(dtype), bias.float()


def _taps(conv: nn.Conv1d, dtype: torch.dtype) -> Weights:
    """Return weight (taps, groups, in of a group, out of a group) and bias."""
    assert conv.bias is not None
    weight = conv.weight.unflatten(0, (GROUPS, -1)).permute(3, 0, 2, 1)
    return weight.contiguous().to(dtype), conv.bias.float()
