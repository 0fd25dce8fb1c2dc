"""Launch configurations measured by scripts/tune_kernels.py: one JSON file for each GPU, named after it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent


def path_of(device: torch.device) -> Path:
    """The file of the GPU (of "cpu" for the interpreter), whether it exists or not."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return _FOLDER / f"{name.replace(' ', '_').replace('/', '_')}.json"


@cache
def load(device: torch.device) -> dict[str, Any]:
    """What was measured on this GPU, by kernel; where nothing was, what was measured on another one of its
    compute capability; else empty."""
    path = path_of(device)
    if path.exists():
        return json.loads(path.read_text())
    if device.type == "cuda":
        capability = list(torch.cuda.get_device_capability(device))
        for other in sorted(_FOLDER.glob("*.json")):
            found = json.loads(other.read_text())
            if found.get("capability") == capability:
                return found
    return {}


def entries(kernel: str, device: torch.device, dtype: torch.dtype) -> list[dict[str, int]]:
    """Launch configurations of a kernel for numbers of this type. They were measured with 16 bits a number:
    those twice as long, which may not fit, have none."""
    return load(device).get(kernel, []) if dtype.itemsize == 2 else []


def save(device: torch.device, found: dict[str, Any], path: Path | None = None) -> None:
    """Write what is used on this GPU so far with `found` in it, to its file or to another one."""
    known = {**load(device), "capability": list(torch.cuda.get_device_capability(device)), **found}
    (path or path_of(device)).write_text(json.dumps(known, indent=2) + "\n")
    load.cache_clear()
