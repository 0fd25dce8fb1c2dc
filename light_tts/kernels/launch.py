"""Launch configurations of the packed kernels: measured on this GPU, else default values."""

from __future__ import annotations

from torch import Tensor

from light_tts.kernels import configs


def geometry(kernel: str, x: Tensor, rows: int) -> dict[str, int] | None:
    """Return the entry for the smallest measured number of rows that is at least `rows`, else the largest;
    None: nothing was measured. Keys: BLOCK_*, num_warps, num_stages and others specific to the kernel."""
    entries = configs.entries(kernel, x.device, x.dtype)
    if not entries:
        return None
    entries = sorted(entries, key=lambda entry: entry["rows"])
    chosen = next((entry for entry in entries if entry["rows"] >= rows), entries[-1])
    return {name: value for name, value in chosen.items() if name != "rows"}
