"""Arguments of the vocoder's convolutions: weights of parallel branches, lengths of a level, and the
operations after the sum. Frames are channels-last: (branches, batch, frames, channels)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Parts of a sum of exact products, one for each warp of a program: with few frames there are few programs,
# and a sum in one part takes long.
PARTS = 8

Activation = Literal["none", "snake", "leaky_relu", "elu", "abs"]


@dataclass(frozen=True)
class Taps:
    """How one branch reads and writes. taps: number of frames it reads."""

    taps: int
    dilation: int = 1
    padding: int = 0
    shift: int = 0


class Convolutions:
    """Branches with weights in the kernel's layout.

    weights: for each branch (taps, in, out); bias: (branches, out) float32. float16 weights multiply float16
    frames, float32 weights float32 frames, with about the precision of float32 if `exact` (three TF32
    products), else that of TF32. The sums are always float32.

    name: the key of its launch configurations in kernels/configs/.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        bias: Tensor,
        taps: Sequence[Taps],
        in_stride: int = 1,
        out_stride: int = 1,
        exact: bool = False,
    ) -> None:
        self.branches = len(weights)
        self.taps = tuple(taps)
        self.channels_in, self.channels_out = weights[0].shape[1:]
        self.in_stride, self.out_stride = in_stride, out_stride
        self.precision = "tf32x3" if exact else "tf32"
        self.parts, self.block_in = _division(weights[0].dtype, self.channels_in, taps, exact)
        missing = -self.channels_in % self.block_in
        padded = [F.pad(weight, (0, 0, 0, missing)).flatten(0, 1) for weight in weights]
        self.weight = torch.cat(padded).contiguous()
        self.bias = bias.float().contiguous()
        dtype = str(weights[0].dtype).removeprefix("torch.")
        self.name = f"convolve_{dtype}_{self.channels_in}x{self.channels_out}x{self.branches}"
        first_row, table = 0, []
        for branch, rows in zip(self.taps, padded, strict=True):
            table.append([first_row, branch.taps, branch.dilation, branch.padding, branch.shift])
            first_row += len(rows)
        self.table = torch.tensor(table, dtype=torch.int32, device=bias.device)

    def weights(self) -> list[Tensor]:
        """For each branch (taps, in, out)."""
        ends = [first + self._padded_in * branch.taps for first, branch in self._rows()]
        rows = [self.weight[first:end] for (first, _), end in zip(self._rows(), ends, strict=True)]
        return [
            part.view(-1, self._padded_in, self.channels_out)[:, : self.channels_in].contiguous()
            for part in rows
        ]

    @property
    def _padded_in(self) -> int:
        return self.channels_in + -self.channels_in % self.block_in

    def _rows(self) -> list[tuple[int, Taps]]:
        return list(zip(self.table[:, 0].tolist(), self.taps, strict=True))


def _division(dtype: torch.dtype, channels: int, taps: Sequence[Taps], exact: bool) -> tuple[int, int]:
    """Return the number of parts of the sum over taps and inputs that are added separately, and the inputs
    that are multiplied at once. Neither depends on the number of frames, nor does the order of summation."""
    blocks = -(-channels // 16) * max(branch.taps for branch in taps)
    if exact and blocks >= PARTS:
        return PARTS, 16
    return 1, 16 if channels <= 16 else 64 if dtype == torch.float16 else 32


def transposed(
    weight: Tensor, bias: Tensor, stride: int, padding: int, shift: int = 0, exact: bool = False
) -> Convolutions:
    """Return a transposed convolution as the phases of its output: output frame i is computed from the input
    frames (i + padding) // stride - m with the weights of the taps (i + padding) % stride + m * stride.

    weight: (in, out, taps); bias: (out,). Output frames are moved by `shift`.
    """
    taps = -(-weight.shape[2] // stride)
    padded = F.pad(weight, (0, taps * stride - weight.shape[2])).permute(2, 0, 1)
    return Convolutions(
        [padded[phase::stride] for phase in range(stride)],
        bias.expand(stride, -1),
        [Taps(taps, dilation=-1, shift=phase - padding + shift) for phase in range(stride)],
        out_stride=stride,
        exact=exact,
    )


def repeated(weight: Tensor, bias: Tensor, rate: int, shift: int = 0, exact: bool = False) -> Convolutions:
    """Return a causal convolution of frames of which each is repeated `rate` times, as the phases of its
    output: the taps that see the same input frame are added.

    weight: (out, in, taps), the last tap sees the output's own frame; bias: (out,). Output frames are moved
    by `shift`.
    """
    last = weight.shape[2] - 1
    weights, taps = [], []
    for phase in range(rate):
        seen = [(phase + tap - last) // rate for tap in range(last + 1)]  # input frames, 0: the last one
        before = -seen[0]
        own = torch.zeros(before + 1, *weight.shape[1::-1], dtype=torch.float64, device=weight.device)
        index = torch.tensor(seen, device=weight.device) + before
        weights.append(own.index_add(0, index, weight.permute(2, 1, 0).double()).to(weight.dtype))
        taps.append(Taps(before + 1, padding=before, shift=phase + shift))
    return Convolutions(weights, bias.expand(rate, -1), taps, out_stride=rate, exact=exact)


@dataclass(frozen=True)
class Frames:
    """A level of the vocoder. lengths: (batch,) int32, the items' lengths in mel frames; a level has `rate`
    frames per mel frame, and `extra` more; an item of length 0 has none."""

    lengths: Tensor
    rate: int = 1
    extra: int = 0

    def of(self, row: int) -> int:
        length = int(self.lengths[row])
        return length * self.rate + self.extra if length else 0


@dataclass(frozen=True)
class Active:
    """out: (branches * copies, batch, frames, out channels): the activated results. `alpha`: (branches *
    copies, channels) of a snake, float32; `slope`: of a leaky ReLU."""

    kind: Activation
    out: Tensor
    alpha: Tensor | None = None
    slope: float = 0.0


@dataclass(frozen=True)
class Sums:
    """Tensors to add: `residual` (branches or 1, batch, frames, channels), `addend` (1, ...)."""

    residual: Tensor | None = None
    addend: Tensor | None = None


NO_SUMS = Sums()
