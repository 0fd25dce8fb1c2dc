"""The device that a process computes on: the one place where CUDA is chosen."""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """The device that was asked for is not there."""


def choose_device(device: str, data_type: str, index: int = 0) -> tuple[torch.device, torch.dtype]:
    """Device and number type for process `index` of a stage: GPU `index % GPUs` with `data_type` (the name of
    a torch dtype), or the CPU in float32. `device`: "auto", "cuda" or "cpu".

    The LLM always passes 0. Raises DeviceError for "cuda" where torch sees no GPU.
    """
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if not gpus:
        if device == "cuda":
            raise DeviceError("--device cuda was given but torch sees no CUDA device on this machine")
        return torch.device("cpu"), torch.float32
    chosen = torch.device("cuda", index % gpus)
    torch.cuda.set_device(chosen)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it already does for matrix products
    return chosen, getattr(torch, data_type)
