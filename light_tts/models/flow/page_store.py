"""Device memory for the state of earlier frames, in pages of one attention chunk."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

COPIES = 2  # of a batch: with and without guidance


class TooLittleMemory(Exception):
    """The memory for pages is too small."""


class PageLimits(NamedTuple):
    """How many pages a store may have."""

    least: int = 1
    most: int = sys.maxsize


ANY_PAGES = PageLimits()


class PageStore:
    """As many pages as `limits` allow and fit in `room` bytes; half of that, a quarter and so on, if the
    device has no more memory. All are allocated at once, so that there are not fewer later. A page holds, for
    all Euler steps, the keys and values of `frames` frames in each attention layer, and the last `edge`
    inputs of each convolution.

    layers: for each, (pages, steps, COPIES, frames, 2 * inner); edges: for each convolution, (pages, steps,
    COPIES, edge, inputs).
    """

    def __init__(
        self,
        room: int,
        frames: int,
        steps: int,
        layers: int,
        inner: int,
        edge: int,
        inputs: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        limits: PageLimits = ANY_PAGES,
    ) -> None:
        """inner: channels of a key; edge: number of preceding frames that a convolution reads; inputs:
        channels of each convolution's input. Raises TooLittleMemory if fewer pages than allowed fit,
        torch.OutOfMemoryError if the device has no memory for them, and ValueError if a page is shorter than
        an edge, as all frames of an edge are in the page that ends with it."""
        if frames < edge:
            raise ValueError(f"an attention chunk of {frames} frames is shorter than a convolution's {edge}")
        keys = (steps, layers, COPIES, frames, 2 * inner)
        edges = [(steps, COPIES, edge, channels) for channels in inputs]
        self.frames = frames
        self.edge = edge
        self.page_bytes = dtype.itemsize * sum(map(math.prod, [keys, *edges]))
        pages = min(room // self.page_bytes, limits.most)
        if pages < limits.least:
            raise TooLittleMemory(
                f"flow_memory_gpu_mb: a page of {frames} frames needs {self.page_bytes / 2**20:.2f} MiB; at "
                f"least {limits.least} must fit in {room / 2**20:.2f} MiB"
            )

        def allocate(pages: int) -> list[Tensor]:
            return [torch.zeros(pages, *shape, dtype=dtype, device=device) for shape in [keys, *edges]]

        store, *self.edges = _halved_until_it_fits(allocate, pages, limits.least)
        self.pages = len(store)
        self.layers = [store[:, :, layer] for layer in range(layers)]


def _halved_until_it_fits(allocate: Callable[[int], list[Tensor]], pages: int, least: int) -> list[Tensor]:
    """Return what `allocate` does for `pages` or, as long as that raises torch.OutOfMemoryError, for half as
    many, down to `least`."""
    while pages // 2 >= least:
        try:
            return allocate(pages)
        except torch.OutOfMemoryError:
            log.warning("flow_memory_gpu_mb: no memory for %d pages, trying %d", pages, pages // 2)
            pages //= 2
    return allocate(pages)
