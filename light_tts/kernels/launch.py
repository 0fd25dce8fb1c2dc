"""Launch configurations: how the work of a kernel is divided into programs.

A configuration is a dict of what is passed to Triton, under its names: BLOCK_* and others specific to the
kernel, num_warps, num_stages. The Python function of a kernel takes the one measured on this GPU, else a
default, and passes it as **config. Results depend on it only through the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from light_tts.kernels import configs

Config = dict[str, int]
# Keys of an entry in kernels/configs/ that say what it was measured for; the others are the configuration.
SIZES = ("rows", "outputs", "inputs", "groups", "max_length")


def measured(entries: Sequence[dict[str, int]], **sizes: int) -> Config | None:
    """Return the configuration measured for exactly these sizes; None: there is none."""
    return next((_config(entry) for entry in entries if sizes.items() <= entry.items()), None)


def measured_up_to(entries: Sequence[dict[str, int]], **sizes: int) -> Config | None:
    """Return that of the smallest entry whose sizes are at least these; None: there is none."""
    for entry in sorted(entries, key=lambda entry: [entry[name] for name in sizes]):
        if all(entry[name] >= size for name, size in sizes.items()):
            return _config(entry)
    return None


def measured_for_rows(kernel: str, x: Tensor, rows: int) -> Config | None:
    """Return that of the smallest measured number of rows that is at least `rows`, else of the largest; None:
    nothing was measured for the dtype of `x`."""
    entries = configs.entries(kernel, x.device, x.dtype)
    if not entries:
        return None
    most = max(entry["rows"] for entry in entries)
    return measured_up_to(entries, rows=min(rows, most))


def rows_of_tile(kernel: str, device: torch.device, dtype: torch.dtype, rows: int) -> int | None:
    """Return the rows of a tile of a kernel that computes whole blocks, if it is the fastest for this number
    of rows, as measured on this GPU; else None. An entry whose "BLOCK_ROWS" is 0 says that it is not."""
    entry = measured_up_to(configs.entries(kernel, device, dtype), rows=rows)
    return None if entry is None else entry["BLOCK_ROWS"] or None


def _config(entry: dict[str, int]) -> Config:
    return {name: value for name, value in entry.items() if name not in SIZES}
