"""Numerical precision of a device: fast during training, full for results that are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def training_device() -> torch.device:
    """Return the GPU if there is one, and allow rounded products from now on."""
    set_precision(fast=True)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_precision(fast: bool) -> None:
    """Set whether float32 products may use TF32."""
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy `values` from the host to the device asynchronously."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU for a part of a step. Casts are not cached, as recorded steps require."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)
