"""Launch configurations measured by scripts/tune_kernels.py: one JSON file for each GPU, named after it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def path_of(device: torch.device) -> Path:
    """The file of the GPU (of "cpu" for the interpreter), whether it exists or not."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return _FOLDER / f"{name.replace(' ', '_').replace('/', '_')}.json"


@cache
def load(device: torch.device) -> dict[str, int | dict[str, int] | list[dict[str, int]]]:
    """What was measured on this GPU, by kernel; empty where nothing was."""
    path = path_of(device)
    return json.loads(path.read_text()) if path.exists() else {}
