"""Asynchronous copies between host and device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from light_tts.common.cores import can_wait_awake


def pinned(values: np.ndarray, device: torch.device) -> Tensor:
    """Return `values` in pinned host memory, for an asynchronous copy to `device`. The allocator does not
    reuse the memory before the copy is done. On the CPU the tensor shares the memory of `values`."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory()


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Return `values` on the device, valid for work queued on the current stream from now on. On the CPU the
    tensor shares the memory of `values`."""
    return pinned(values, device).to(device, non_blocking=True)


class Download:
    """Asynchronous copy of a tensor to the host, as of the work queued on the current stream so far. urgent:
    a thread that waits for it does not sleep, if there are enough cores."""

    def __init__(self, tensor: Tensor, urgent: bool = False) -> None:
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()
        else:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.contiguous(), non_blocking=True)
            self._done = torch.cuda.Event(blocking=not (urgent and can_wait_awake()))
            self._done.record()

    def wait(self) -> Tensor:
        """Wait for the copy; return the tensor in host memory."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
