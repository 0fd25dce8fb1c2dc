"""The components of HiFT with weights in the kernels' layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from light_tts.kernels.vocoder.conv import convolve
from light_tts.kernels.vocoder.layout import Active, Convolutions, Frames, Sums, Taps
from light_tts.kernels.vocoder.source import Voicing
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.hift import Hift, ResidualPairs
from light_tts.models.vocoder.source import SourceModule

Padding = Callable[[nn.Conv1d], int]  # the number of zero frames before the first one
Upsampling = Callable[[int], Convolutions]  # of a level


class ResBlocks:
    """Residual blocks that differ only in their kernel sizes: one launch for all convolutions of the same
    depth. The frames between the convolutions have `dtype`; the running sums are float32."""

    def __init__(self, blocks: Sequence[ResidualPairs], padding: Padding, dtype: torch.dtype) -> None:
        # longest first, so that the last one to start ends soon
        blocks = sorted(blocks, key=lambda block: -block.kernel_size)
        self.branches, self.dtype = len(blocks), dtype
        self._pairs = [
            (_parallel(firsts, padding, dtype), _parallel(seconds, padding, dtype))
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


def levels(
    hift: Hift | CausalHift, upsampling: Upsampling, padding: Padding, dtype: torch.dtype
) -> list[Level]:
    config, found = hift.config, []
    branches = len(config.resblock_kernel_sizes)
    for index, down in enumerate(hift.source_downs):
        blocks = hift.resblocks[index * branches : (index + 1) * branches]
        found.append(
            Level(
                rate=math.prod(config.upsample_rates[: index + 1]),
                extra=extra(hift, index),
                up=upsampling(index),
                down=exact(down, padding),
                excitation=ResBlocks([hift.source_resblocks[index]], padding, dtype),
                blocks=ResBlocks(blocks, padding, dtype),
            )
        )
    return found


def extra(hift: Hift | CausalHift, level: int) -> int:
    """Return `Level.extra`."""
    return int(level == len(hift.ups) - 1)


def centred(conv: nn.Conv1d) -> int:
    """The `Padding` of `Hift`."""
    assert isinstance(conv.padding, tuple)  # a number of frames, not "same" or "valid"
    return conv.padding[0]


def exact(conv: nn.Conv1d, padding: Padding) -> Convolutions:
    """Return a convolution of float32 frames that is about as exact as float32."""
    weight = conv.weight.detach().float().permute(2, 1, 0)
    return Convolutions([weight], bias_of(conv)[None], [_taps(conv, padding)], conv.stride[0], exact=True)


def bias_of(conv: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
    assert conv.bias is not None  # all convolutions of HiFT have one
    return conv.bias.detach()


def voicing(source: SourceModule) -> Voicing:
    return Voicing(
        source.sample_rate,
        source.samples_per_frame,
        source.amplitude,
        source.noise_level,
        source.voiced_threshold,
    )


def mix(source: SourceModule) -> tuple[Tensor, Tensor]:
    """Return weight (waves,) and bias (1,) with which the harmonics are mixed."""
    return source.l_linear.weight.detach().flatten().contiguous(), source.l_linear.bias.detach()


def _parallel(convs: Sequence[nn.Conv1d], padding: Padding, dtype: torch.dtype) -> Convolutions:
    weights = [conv.weight.detach().permute(2, 1, 0).to(dtype) for conv in convs]
    bias = torch.stack([bias_of(conv) for conv in convs])
    return Convolutions(weights, bias, [_taps(conv, padding) for conv in convs])


def _taps(conv: nn.Conv1d, padding: Padding) -> Taps:
    return Taps(conv.kernel_size[0], conv.dilation[0], padding(conv))
