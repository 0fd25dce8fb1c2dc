"""The estimator on a CPU: the Euler steps over the next frames of one sequence, with cached state for the
earlier ones.

The same arithmetic as estimator.py, in a layout without transposes: (COPIES, EDGE + frames, channels), where
each copy starts with the last frames before these, which a causal convolution reads. Values that depend only
on the time, which takes ten fixed values, are computed once, and values shared by all steps once per run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.flow.chunk_estimator import ChunkEstimator, ChunkRun
from light_tts.models.flow.estimator_parts import sinusoids
from light_tts.models.flow.unet.estimator import (
    CausalBlock,
    CausalConv1d,
    Estimator,
    ResnetBlock,
    TransformerBlock,
)

EDGE = 2  # number of preceding frames that a convolution reads


class UnetChunkEstimator(ChunkEstimator):
    """See `ChunkEstimator`."""

    def __init__(self, estimator: Estimator, steps: Sequence[tuple[float, float]], guidance: float) -> None:
        [(first, blocks, conv)] = estimator.down_blocks
        [(last, last_blocks, last_conv)] = estimator.up_blocks
        stages = [(first, blocks), *estimator.mid_blocks, (last, last_blocks)]
        self._entrance = _Entrance(first, estimator.final_proj.out_channels)
        self._resnets = [_Resnet(resnet) for resnet, _ in stages[1:]]
        self._transformers = [[_Transformer(block) for block in blocks] for _, blocks in stages]
        self._down, self._up = _Conv.of(conv), _Conv.of(last_conv)
        self._final = _Block(estimator.final_block)
        self._projection = estimator.final_proj.weight[:, :, 0].contiguous(), estimator.final_proj.bias
        self._shifts = _shifts(estimator, [resnet for resnet, _ in stages], [t for t, _ in steps])
        layers, inner = sum(map(len, self._transformers)), self._transformers[0][0].inner
        super().__init__(steps, guidance, layers, inner, EDGE)

    def _field(self, given: Tensor, run: ChunkRun) -> Callable[[int, Tensor], Tensor]:
        first, side = self._entrance.given(F.pad(given, (0, 0, EDGE, 0))[None], run)
        return lambda step, x: self._velocity(x, first, side, self._shifts[step], run)

    def _velocity(self, x: Tensor, first: Tensor, side: Tensor, shifts: Tensor, run: ChunkRun) -> Tensor:
        """x: (frames, mels) -> (COPIES, frames, mels)"""
        x = self._entrance(F.pad(x, (0, 0, EDGE, 0))[None], first, side, shifts[0], run)
        skip = x = self._attend(0, x, run)
        x = self._down(x, run)
        for index, resnet in enumerate(self._resnets[:-1], 1):
            x = self._attend(index, resnet(x, shifts[index], run), run)
        x = self._resnets[-1](torch.cat([x, skip], 2), shifts[-1], run)
        x = self._final(self._up(self._attend(-1, x, run), run), run)
        return F.linear(x[:, EDGE:], *self._projection)

    def _attend(self, stage: int, x: Tensor, run: ChunkRun) -> Tensor:
        for block in self._transformers[stage]:
            x = block(x, run)
        return x


class _Conv:
    """A causal convolution over three frames, as one product per tap."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """weight: (out, in, 3)"""
        self._taps, self._bias = weight.permute(2, 1, 0).contiguous(), bias

    @classmethod
    def of(cls, conv: CausalConv1d) -> _Conv:
        return cls(conv.weight, conv.bias)

    def __call__(self, x: Tensor, run: ChunkRun) -> Tensor:
        """x: (copies, EDGE + frames, in) -> (copies, EDGE + frames, out), with undefined EDGE."""
        rows = run.join(x).flatten(0, 1)
        out = x.new_empty(len(rows), self._taps.shape[2])
        out[:EDGE] = 0
        # All copies at once: a row reads the two before it, so only the second copy's EDGE mixes both.
        torch.addmm(self._bias, rows[:-EDGE], self._taps[0], out=out[EDGE:])
        out[EDGE:].addmm_(rows[1:-1], self._taps[1]).addmm_(rows[EDGE:], self._taps[2])
        return out.view(*x.shape[:2], -1)


class _Norm:
    """LayerNorm and Mish."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._arguments = norm.normalized_shape, norm.weight, norm.bias, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return mish_(F.layer_norm(x, *self._arguments))


class _Block:
    def __init__(self, block: CausalBlock) -> None:
        conv, _, norm, _ = block.block
        self._conv, self._norm = _Conv.of(conv), _Norm(norm)

    def __call__(self, x: Tensor, run: ChunkRun) -> Tensor:
        return self._norm(self._conv(x, run))


class _Entrance:
    """The first residual block, whose input is the state and the conditioning, side by side. The state is the
    same in both copies. The conditioning is constant over the steps and absent in the unconditioned copy."""

    def __init__(self, block: ResnetBlock, mels: int) -> None:
        conv, _, norm, _ = block.block1.block
        self._of_x = _Conv(conv.weight[:, :mels], torch.zeros_like(conv.bias))
        self._of_given = _Conv(conv.weight[:, mels:], torch.zeros_like(conv.bias))
        self._bias, self._norm = conv.bias, _Norm(norm)
        self._second = _Block(block.block2)
        weight = block.res_conv.weight[:, :, 0]
        self._side_of_x, self._side_of_given = weight[:, :mels].contiguous(), weight[:, mels:].contiguous()
        assert block.res_conv.bias is not None  # all convolutions of the estimator have one
        self._side_bias = block.res_conv.bias

    def given(self, given: Tensor, run: ChunkRun) -> tuple[Tensor, Tensor]:
        """given: (1, EDGE + frames, channels) -> its contribution to the convolution and to the side path,
        biases included: both (COPIES, EDGE + frames, width)"""
        first, side = self._of_given(given, run), F.linear(given, self._side_of_given)
        first, side = (torch.cat([share, torch.zeros_like(share)]) for share in (first, side))
        return first + self._bias, side + self._side_bias

    def __call__(self, x: Tensor, first: Tensor, side: Tensor, shift: Tensor, run: ChunkRun) -> Tensor:
        """x: (1, EDGE + frames, mels)"""
        h = self._norm(first + self._of_x(x, run))
        h = self._second(h.add_(shift), run)
        return h.add_(side).add_(F.linear(x, self._side_of_x))


class _Resnet:
    def __init__(self, block: ResnetBlock) -> None:
        self._first, self._second = _Block(block.block1), _Block(block.block2)
        self._side = block.res_conv.weight[:, :, 0].contiguous(), block.res_conv.bias

    def __call__(self, x: Tensor, shift: Tensor, run: ChunkRun) -> Tensor:
        h = self._first(x, run).add_(shift)
        return self._second(h, run).add_(F.linear(x, *self._side))


class _Transformer:
    def __init__(self, block: TransformerBlock) -> None:
        attention, feed = block.attn1, block.ff.net
        projections = (attention.to_q, attention.to_k, attention.to_v)
        self._heads = attention.heads
        self._qkv = torch.cat([linear.weight for linear in projections])
        self._out, self._norm1, self._norm3 = attention.to_out[0], block.norm1, block.norm3
        self._enter, self._leave = feed[0].proj, feed[2]
        self.inner = len(self._qkv) // 3

    def __call__(self, x: Tensor, run: ChunkRun) -> Tensor:
        """x: (COPIES, EDGE + frames, width), in place"""
        q, k, v = F.linear(self._norm1(x), self._qkv)[:, EDGE:].chunk(3, dim=2)
        q, k, v = (rows.unflatten(2, (self._heads, -1)).transpose(1, 2) for rows in (q, *run.all_keys(k, v)))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x[:, EDGE:] += self._out(attended)
        return x.add_(self._leave(F.gelu(self._enter(self._norm3(x)))))


def mish_(x: Tensor) -> Tensor:
    """Compute x * tanh(log(1 + exp(x))) in place as x - 2 x / ((1 + exp(x))^2 + 1), much faster than
    PyTorch's."""
    divisor = x.clamp(max=20).exp_().add_(1).square_().add_(1)
    return x.addcdiv_(x, divisor, value=-2)


def _shifts(estimator: Estimator, resnets: Sequence[ResnetBlock], times: Sequence[float]) -> list[Tensor]:
    """Return the time embeddings of the residual blocks for each step: (blocks, width)"""
    embedded = F.mish(estimator.time_mlp(sinusoids(torch.tensor(times), estimator.time_channels)))
    return list(torch.stack([block.mlp[1](embedded) for block in resnets], dim=1))
