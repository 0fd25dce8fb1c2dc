"""The components of HiFT with weights in the kernels' layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from light_tts.kernels.vocoder.conv import convolve
from light_tts.kernels.vocoder.layout import Active, Convolutions, Frames, Sums, Taps, transposed
from light_tts.models.vocoder.hift import Hift, ResBlock


class ResBlocks:
    """Residual blocks that differ only in their kernel sizes: one launch for all convolutions of the same
    depth. The frames between the convolutions have `dtype`; the running sums are float32."""

    def __init__(self, blocks: Sequence[ResBlock], dtype: torch.dtype) -> None:
        # longest first, so that the last one to start ends soon
        blocks = sorted(blocks, key=lambda block: -block.kernel_size)
        self.branches, self.dtype = len(blocks), dtype
        self._pairs = [
            (_parallel(firsts, dtype), _parallel(seconds, dtype))
            for firsts, seconds in zip(
                zip(*(block.convs1 for block in blocks), strict=True),
                zip(*(block.convs2 for block in blocks), strict=True),
                strict=True,
            )
        ]
        self._alphas1, self._alphas2 = (
            [
                torch.stack([snake.alpha.detach() for snake in snakes]).contiguous()
                for snakes in zip(*activations, strict=True)
            ]
            for activations in (
                [block.activations1 for block in blocks],
                [block.activations2 for block in blocks],
            )
        )

    def entrance(self, x: Tensor) -> Active:
        """Return memory for the blocks' input: `x` (1, batch, frames, channels) after their first snakes."""
        return self._snake(x, self._alphas1[0])

    def __call__(
        self,
        x: Tensor,
        entered: Tensor,
        level: Frames,
        addend: Tensor | None = None,
        leaving: Active | None = None,
    ) -> Tensor:
        """x: (1, batch, frames, channels) float32; `entered` (branches, ...): the result of `entrance` for
        it; both are overwritten. Returns results (branches, ...) float32, with `addend` (1, ...) added;
        `leaving`: an activation of them."""
        out = x if self.branches == 1 else x.new_empty(self.branches, *x.shape[1:])
        between = torch.empty_like(entered)
        last = len(self._pairs) - 1
        for depth, (first, second) in enumerate(self._pairs):
            convolve(first, entered, level, level, None, Active("snake", between, alpha=self._alphas2[depth]))
            snake = leaving if depth == last else Active("snake", entered, alpha=self._alphas1[depth + 1])
            sums = Sums(x if depth == 0 else out, addend if depth == last else None)
            convolve(second, between, level, level, out, snake, sums)
        return out

    def _snake(self, x: Tensor, alpha: Tensor) -> Active:
        return Active("snake", x.new_empty(self.branches, *x.shape[1:], dtype=self.dtype), alpha=alpha)


@dataclass(frozen=True)
class Level:
    """One upsampling level. rate: its frames per mel frame; extra: 1 at the last level, which is padded on
    the left by reflection."""

    rate: int
    extra: int
    up: Convolutions
    down: Convolutions
    excitation: ResBlocks
    blocks: ResBlocks


def levels(hift: Hift, dtype: torch.dtype) -> list[Level]:
    config, found = hift.config, []
    branches = len(config.resblock_kernel_sizes)
    for index, (up, down) in enumerate(zip(hift.ups, hift.source_downs, strict=True)):
        extra = int(index == len(hift.ups) - 1)
        blocks = hift.resblocks[index * branches : (index + 1) * branches]
        found.append(
            Level(
                rate=math.prod(config.upsample_rates[: index + 1]),
                extra=extra,
                up=transposed(
                    up.weight.detach(), up.bias.detach(), up.stride[0], up.padding[0], shift=extra, exact=True
                ),
                down=exact(down),
                excitation=ResBlocks([hift.source_resblocks[index]], dtype),
                blocks=ResBlocks(blocks, dtype),
            )
        )
    return found


def exact(conv: nn.Conv1d) -> Convolutions:
    """Return a convolution of float32 frames that is about as exact as float32."""
    weight = conv.weight.detach().float().permute(2, 1, 0)
    return Convolutions([weight], _bias(conv)[None], [_taps(conv)], conv.stride[0], exact=True)


def _parallel(convs: Sequence[nn.Conv1d], dtype: torch.dtype) -> Convolutions:
    weights = [conv.weight.detach().permute(2, 1, 0).to(dtype) for conv in convs]
    bias = torch.stack([_bias(conv) for conv in convs])
    return Convolutions(weights, bias, [_taps(conv) for conv in convs])


def _bias(conv: nn.Conv1d) -> Tensor:
    assert conv.bias is not None  # all convolutions of HiFT have one
    return conv.bias.detach()


def _taps(conv: nn.Conv1d) -> Taps:
    assert isinstance(conv.padding, tuple)  # a number of frames, not "same" or "valid"
    return Taps(conv.kernel_size[0], conv.dilation[0], conv.padding[0])
