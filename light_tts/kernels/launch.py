"""Launch configurations of the packed kernels: what was measured on this GPU, else sane defaults."""

from __future__ import annotations

from torch import Tensor

from light_tts.kernels import configs


def geometry(kernel: str, x: Tensor, rows: int) -> dict[str, int] | None:
    """The entry for the smallest measured number of rows that is not below `rows`, else the largest; None:
    nothing was measured. Keys: BLOCK_*, num_warps, num_stages and whatever else the kernel knows."""
    entries = configs.entries(kernel, x.device, x.dtype)
    if not entries:
        return None
    entries = sorted(entries, key=lambda entry: entry["rows"])
    chosen = next((entry for entry in entries if entry["rows"] >= rows), entries[-1])
    return {name: value for name, value in chosen.items() if name != "rows"}
