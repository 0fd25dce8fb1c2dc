"""CUDA graphs: a sequence of kernels recorded once for each size and launched as one from then on.

What is recorded must read its inputs from tensors that stay where they are, and leave its results in such
tensors. Without CUDA, or with graphs switched off, the same function is simply called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class GraphCache:
    """The graphs of one stream, by key. They share one memory pool, so they must not run at the same time;
    a result that lies in a tensor made inside the function is valid until the next run of any of them."""

    WARM_UP_RUNS = 2  # what is made at a first run (kernels, library handles) must not be recorded

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, function: Callable[[], object]) -> object:
        """What `function` returns: recorded at the first call with this key, replayed at every one.
        `function` must do the same to the device at every run with this key, and must not wait for it."""
        if not self.enabled:
            return function()
        if key not in self._graphs:
            self.record(key, function)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def record(self, key: Hashable, function: Callable[[], object]) -> None:
        """Runs `function` WARM_UP_RUNS times and records it; the current stream must not be the default
        one."""
        for _ in range(self.WARM_UP_RUNS):
            function()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(): it empties the allocator's cache each time. thread_local: other threads of
        # the process may allocate and launch meanwhile.
        torch.cuda.current_stream().synchronize()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
        self._graphs[key] = (graph, result)

    def clear(self) -> None:
        """Forget all of them, and give back their memory."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
