"""How a device computes: as fast as it can, while it learns; in full precision, for what is kept."""

from __future__ import annotations

import torch
from torch import Tensor


def training_device() -> torch.device:
    """The GPU if there is one. Products may be rounded from now on."""
    set_precision(fast=True)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_precision(fast: bool) -> None:
    """Whether products of float32 may be computed in TF32."""
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values`, which are on the host, on the device; a GPU is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, for a part of a step. Nothing is kept of it, as recorded steps need."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)
