"""Launch configurations measured by tune_kernels.py, tune_flow.py and tune_hift.py in scripts/: one JSON file
per GPU, named after it. For the entries see launch.py."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent


def path_of(device: torch.device) -> Path:
    """Return the path of the GPU's file ("cpu" for the interpreter), which may not exist."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return _FOLDER / f"{name.replace(' ', '_').replace('/', '_')}.json"


@cache
def load(device: torch.device) -> dict[str, Any]:
    """Return the measurements for this GPU, by kernel, or else those of another GPU with the same compute
    capability, or else nothing."""
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
    """Return the launch configurations of a kernel for this data type. They were measured with 16-bit
    numbers; 32-bit numbers, which may not fit, have none."""
    return load(device).get(kernel, []) if dtype.itemsize == 2 else []


def save(device: torch.device, found: dict[str, Any], path: Path | None = None) -> None:
    """Write the measurements in use on this GPU, updated with `found`, to its file or to `path`."""
    known = {**load(device), "capability": list(torch.cuda.get_device_capability(device)), **found}
    (path or path_of(device)).write_text(json.dumps(known, indent=2) + "\n")
    load.cache_clear()
