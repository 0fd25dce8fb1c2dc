"""Device memory for the state of earlier frames, in pages of one attention chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

COPIES = 2  # of a batch: with and without guidance
EDGE = 2  # number of preceding frames that a convolution reads


class TooLittleMemory(Exception):
    """The memory for pages is too small or not available."""


class PageStore:
    """As many pages as fit in `room` bytes, at least one. A page holds, for all Euler steps, the keys and
    values of `frames` frames in each attention layer, and the last EDGE inputs of each convolution.

    layers: for each, (pages, steps, COPIES, frames, 2 * inner); edges: for each convolution, (pages, steps,
    COPIES, EDGE, inputs).
    """

    def __init__(
        self,
        room: int,
        frames: int,
        steps: int,
        layers: int,
        inner: int,
        inputs: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """inner: channels of a key; inputs: channels of each convolution's input. Raises TooLittleMemory if
        not even one page fits or the device does not have enough memory."""
        keys = (steps, layers, COPIES, frames, 2 * inner)
        edges = [(steps, COPIES, EDGE, channels) for channels in inputs]
        self.frames = frames
        self.page_bytes = dtype.itemsize * sum(map(math.prod, [keys, *edges]))
        self.pages = room // self.page_bytes
        if self.pages == 0:
            raise TooLittleMemory(
                f"flow_memory_gpu_mb: a page of {frames} frames needs {self.page_bytes / 2**20:.2f} MiB"
            )
        try:
            store, *self.edges = (
                torch.zeros(self.pages, *shape, dtype=dtype, device=device) for shape in [keys, *edges]
            )
        except torch.OutOfMemoryError as error:
            raise TooLittleMemory(f"flow_memory_gpu_mb: {device} has no {room >> 20} MiB left") from error
        self.layers = [store[:, :, layer] for layer in range(layers)]
