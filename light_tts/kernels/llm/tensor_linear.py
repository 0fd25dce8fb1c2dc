"""A linear layer for up to 64 rows, fused with the surrounding operations, in CUDA C++ (tensor_linear.cu),
for an H100 or H200.

It takes as long as reading its weight, so the weight is stored in the order in which the tensor cores want
it: each lane loads its part straight into registers, as long as the previous kernel still runs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from light_tts.kernels import configs, overlap
from light_tts.kernels.cuda.kernel import Kernel, available
from light_tts.kernels.launch import Config, measured_up_to

SOURCE = Path(__file__).with_suffix(".cu")
MAX_ROWS = 64
TILE = 16  # outputs; in a gated layer, 8 gates and the values that they multiply
STEP = 32  # inputs: two products of the tensor cores
_MOST_WARPS = 32  # of a thread block
_MOST_SHARED = 227 * 1024  # bytes of shared memory
_RECEIPT = 16  # of these
_MANY_OUTPUTS = 4096  # of more, a block has several tiles, so that all blocks run at once


class Params(ctypes.Structure):
    """The parameters of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        ("rows", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. norm: the rows are divided by their root mean squares first; gated:
    silu(gate) * up; add: to what `out` contains; row_tiles: of 8 rows; config: see `linear_config`."""

    dtype: torch.dtype
    norm: bool
    bias: bool
    gated: bool
    add: bool
    row_tiles: int
    inputs: int
    output_tiles: int
    splits: int
    pairs: int
    staged: int

    @property
    def warps(self) -> int:
        return -(-self.inputs // (STEP * self.splits * self.pairs))

    @property
    def macros(self) -> dict[str, int]:
        return {
            "BFLOAT16": int(self.dtype == torch.bfloat16),
            "NORM": int(self.norm),
            "BIAS": int(self.bias),
            "GATED": int(self.gated),
            "ADD": int(self.add),
            "ROW_TILES": self.row_tiles,
            "INPUTS": self.inputs,
            "TILES": self.output_tiles,
            "SPLITS": self.splits,
            "WARPS": self.warps,
            "PAIRS": self.pairs,
            "STAGED": self.staged,
        }

    @property
    def shared_bytes(self) -> int:
        """The shared memory of a thread block, as the kernel divides it."""
        rows, row = 8 * self.row_tiles, 4 * (TILE * self.output_tiles + 4)
        part = rows * max(row, 64 * self.pairs if self.staged else 0)
        received = rows // self.splits * row
        return self.warps * part + (self.splits - 1) * received + _RECEIPT

    def blocks(self, outputs: int) -> int:
        """Return the number of thread blocks."""
        return -(-outputs * (1 + self.gated) // (TILE * self.output_tiles)) * self.splits


class TensorLinear:
    """weight: (outputs, inputs), gated: (2 * outputs, inputs), gates first, in a 16-bit dtype; is copied.
    bias: (outputs,). eps: of the norm before the layer, whose weight is folded in; None: there is no norm.
    The sizes must be `supported`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, eps: float | None = None, gated: bool = False
    ) -> None:
        self.outputs = len(weight) // (1 + gated)
        self.inputs = weight.shape[1]
        self.weight = pack(weight, gated)
        self._bias = bias
        self._eps = eps
        self._gated = gated

    def __call__(self, x: Tensor, out: Tensor | None = None, config: Config | None = None) -> Tensor:
        """Add the layer's result for x to `out`, or return it if there is no `out`. x: (rows, inputs),
        contiguous, of at most MAX_ROWS rows; out: (rows, outputs); config: None for the measured one. Raises
        ValueError for more rows."""
        variant = self.variant(x, out is not None, config)
        if out is None:
            out = x.new_empty(len(x), self.outputs)
        kernel = _kernel(x.device, variant)
        overlapping = overlap.enabled(x.device, "llm", len(x))
        blocks = variant.blocks(self.outputs)
        kernel.launch((blocks, 1, 1), self.params(x, out), overlapping)
        return out

    def variant(self, x: Tensor, add: bool, config: Config | None = None) -> Variant:
        """Return the variant for `x`. Raises ValueError for too many rows."""
        rows = len(x)
        if rows > MAX_ROWS:
            raise ValueError(f"tensor_linear: {rows} rows, at most {MAX_ROWS}")
        row_tiles = next(tiles for tiles in (1, 2, 4, 8) if rows <= 8 * tiles)
        if config is None:
            config = linear_config(x.device, x.dtype, self.outputs, self.inputs, self._gated, 8 * row_tiles)
        return Variant(
            x.dtype,
            norm=self._eps is not None,
            bias=self._bias is not None,
            gated=self._gated,
            add=add,
            row_tiles=row_tiles,
            inputs=self.inputs,
            **_choices(config, row_tiles),
        )

    def params(self, x: Tensor, out: Tensor) -> Params:
        params = Params(
            x=x.data_ptr(),
            weight=self.weight.data_ptr(),
            out=out.data_ptr(),
            rows=len(x),
            outputs=self.outputs,
            eps=self._eps or 0.0,
        )
        if self._bias is not None:
            params.bias = self._bias.data_ptr()
        return params


def measured_rows(device: torch.device, dtype: torch.dtype) -> range:
    """Return the numbers of rows for which these kernels were measured to be the fastest. It is empty if they
    were not, or are not available."""
    entries = [entry for entry in configs.entries("tensor_linear", device, dtype) if "outputs" not in entry]
    if not entries or not available(device):
        return range(0)
    first = min(entry.get("first", 1) for entry in entries)
    return range(first, min(max(entry["rows"] for entry in entries), MAX_ROWS) + 1)


def supported(outputs: int, inputs: int, gated: bool = False) -> bool:
    """Return whether the kernel computes layers of this size."""
    if outputs % 2 or inputs % STEP:
        return False
    for row_tiles in (1, 2, 4, 8):
        config = _default(outputs, inputs, gated, 8 * row_tiles)
        variant = Variant(
            torch.float16,
            norm=gated,
            bias=False,
            gated=gated,
            add=False,
            row_tiles=row_tiles,
            inputs=inputs,
            **_choices(config, row_tiles),
        )
        if variant.warps > _MOST_WARPS or variant.shared_bytes > _MOST_SHARED:
            return False
    return True


@cache
def linear_config(
    device: torch.device, dtype: torch.dtype, outputs: int, inputs: int, gated: bool, rows: int
) -> Config:
    """Return the configuration for a layer and up to this number of rows. A thread block computes
    OUTPUT_TILES tiles, from a SPLITS-th of the inputs; a warp takes PAIRS * 32 of these, the last one maybe
    fewer. STAGED, with more than 8 rows: 1: all of them are copied to shared memory at once; 0: they are read
    8 at a time. The result is shared: do not modify it."""
    entries = configs.entries("tensor_linear", device, dtype)
    own = [entry for entry in entries if (entry.get("outputs"), entry.get("inputs")) == (outputs, inputs)]
    return measured_up_to(own, rows=rows) or _default(outputs, inputs, gated, rows)


def _default(outputs: int, inputs: int, gated: bool, rows: int) -> Config:
    splits, output_tiles, most = (1, 1, 4) if rows <= 32 else (2, 1, 2)
    if inputs > 2048:
        splits, output_tiles, most = (4, 2, 5) if rows > 16 else (2, 1, 4)
    elif outputs > _MANY_OUTPUTS:
        splits, output_tiles, most = (1, 2, 7) if rows <= 32 else (1, 5 if gated else 4, 4)
    if inputs % (STEP * splits):
        splits = 1
    steps = inputs // (STEP * splits)
    pairs = -(-steps // -(-steps // most))  # as equal as possible
    return {"OUTPUT_TILES": output_tiles, "SPLITS": splits, "PAIRS": pairs, "STAGED": 1}


def _choices(config: Config, row_tiles: int) -> dict[str, int]:
    """Return the fields of a variant that a configuration determines."""
    return {
        "output_tiles": config["OUTPUT_TILES"],
        "splits": config["SPLITS"],
        "pairs": config["PAIRS"],
        "staged": int(config["STAGED"] and row_tiles > 1),
    }


def pack(weight: Tensor, gated: bool) -> Tensor:
    """Return a weight (outputs, inputs), gated: (2 * outputs, inputs), as the kernel reads it: (tiles of 16
    outputs, products of 16 inputs, lanes, 8), with zeros for outputs that fill up a tile. A tile of a gated
    layer has 8 gates, then the values that they multiply.

    Lane 4 g + t has outputs g and g + 8 of a tile. Of each 32 inputs, which are two products, it has inputs
    8 t to 8 t + 7, the first four for the first product.
    """
    inputs = weight.shape[1]
    if gated:  # (2, tiles, 8, inputs)
        halves = _filled_up(weight.unflatten(0, (2, -1)), TILE // 2).transpose(0, 1)
    else:
        halves = _filled_up(weight[None], TILE)[0].unflatten(1, (2, -1))
    # (tiles, half of a tile, g, pairs, t, product, half of the product, 2)
    fragments = halves.reshape(-1, 2, 8, inputs // STEP, 4, 2, 2, 2)
    ordered = fragments.permute(0, 3, 5, 2, 4, 6, 1, 7)
    return ordered.reshape(-1, inputs // 16, 32, 8).contiguous()


def _filled_up(parts: Tensor, tile: int) -> Tensor:
    """(parts, outputs, inputs) -> (parts, tiles, tile, inputs), with zeros in the last tile"""
    missing = -parts.shape[1] % tile
    return torch.nn.functional.pad(parts, (0, 0, 0, missing)).unflatten(1, (-1, tile))


@cache
def _kernel(device: torch.device, variant: Variant) -> Kernel:
    return Kernel(
        SOURCE,
        "tensor_linear",
        device,
        threads=32 * variant.warps,
        shared_bytes=variant.shared_bytes,
        defines=variant.macros,
    )
