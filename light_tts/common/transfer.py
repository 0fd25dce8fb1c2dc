"""Copies between host and device that the host does not wait for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pinned(values: np.ndarray, device: torch.device) -> Tensor:
    """`values` in host memory from where they are copied to `device` without waiting: pinned memory, which
    the allocator does not hand out again before the copy is done. On the CPU the tensor shares their
    memory."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory()


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """`values` on the device, for what is queued on the current stream from now on. On the CPU the tensor
    shares their memory."""
    return pinned(values, device).to(device, non_blocking=True)


class Download:
    """A tensor on its way to the host, as it is after what is queued on the current stream by now."""

    def __init__(self, tensor: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()
        else:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.contiguous(), non_blocking=True)
            self._done = torch.cuda.Event(blocking=True)  # a waiting thread sleeps
            self._done.record()

    def wait(self) -> Tensor:
        """The tensor in host memory, once it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
