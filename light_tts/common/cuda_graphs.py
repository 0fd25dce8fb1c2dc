"""CUDA graphs: a sequence of kernels, recorded once per size and then launched as a unit.

The recorded function must read its inputs from tensors at fixed addresses and write its results to such
tensors. Without CUDA, or with graphs disabled, the function is simply called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class GraphCache:
    """The graphs of one stream, by key. They share a memory pool, so they must not run concurrently. A result
    in a tensor allocated inside the function is valid until the next run of any of the graphs."""

    WARM_UP_RUNS = 2  # allocations of a first run (kernels, library handles) must not be recorded

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Run `function`, recording it at the first call with this key and replaying it afterwards; return
        what it returned. `function` must queue the same work at every call with this key and must not
        synchronize."""
        if not self.enabled:
            return function()
        if key not in self._graphs:
            self.record(key, function)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def record(self, key: Hashable, function: Callable[[], object]) -> None:
        """Run `function` WARM_UP_RUNS times and record it. The current stream must not be the default one."""
        for _ in range(self.WARM_UP_RUNS):
            function()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(), which empties the allocator's cache each time. thread_local: other threads
        # of the process may allocate and launch in the meantime.
        torch.cuda.current_stream().synchronize()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
        self._graphs[key] = (graph, result)

    def clear(self) -> None:
        """Delete all graphs and free their memory."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
