"""Selects the device a process computes on. CUDA is selected only here."""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """The requested device is not available."""


def choose_device(device: str, data_type: str, index: int = 0) -> tuple[torch.device, torch.dtype]:
    """Return the device and data type for process `index` of a stage: GPU `index % GPUs` with `data_type`
    (the name of a torch dtype), or the CPU with float32. `device`: "auto", "cuda" or "cpu".

    The LLM always passes 0. Raises DeviceError for "cuda" if torch sees no GPU.
    """
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if not gpus:
        if device == "cuda":
            raise DeviceError("--device cuda was given, but torch sees no CUDA device on this machine")
        return torch.device("cpu"), torch.float32
    chosen = torch.device("cuda", index % gpus)
    torch.cuda.set_device(chosen)
    torch.backends.cudnn.allow_tf32 = False  # use full float32, as matrix products already do
    return chosen, getattr(torch, data_type)
