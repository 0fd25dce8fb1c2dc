"""CUDA graphs: a sequence of kernels, recorded once per size and then launched as a unit.

The recorded function must read its inputs from tensors at fixed addresses and write its results to such
tensors. Without a graph (not recorded yet, graphs disabled, no CUDA) the function is simply called, with the
same results.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class SizedWork:
    """Work of one size: the same kernels at every run. `function` queues it and must not synchronize; `reset`
    gives its inputs values with which running it has no effect; `inputs`: a tensor that callers write before
    running it, if there is one for each size. A result in a tensor allocated inside the function is valid
    until the next run of any work with a graph in the same cache."""

    def __init__(
        self,
        function: Callable[[], Any],
        reset: Callable[[], object] = lambda: None,
        inputs: Tensor | None = None,
    ) -> None:
        self.inputs = inputs
        self.uses = 0  # without a graph
        self._function = function
        self._reset = reset
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def run(self) -> Any:
        """Queue the work, as a graph if there is one; return what the function returned."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result

    def record(self, pool: Callable[[], Any]) -> None:
        """Run the work once and record it. Overwrites the inputs."""
        self._reset()
        self._function()  # allocations of a first run (kernels, library handles) must not be recorded
        self._graph, self._result = capture(self._function, pool)


class GraphCache:
    """The graphs of one stream, by size, and the sizes that have none yet. The graphs share a memory pool, so
    they must not run concurrently.

    A size is recorded by `record_next`, which is called when there is nothing else to do: those that were
    used most come first, then those planned first. On a busy server a size is also recorded when it is about
    to be used and has been used `USES` times, but at most one in `PAUSE` seconds in this process, so that
    batches are rarely delayed. A size that cannot be recorded is logged and always runs without a graph. At
    most `LIMIT` sizes are kept, the least recently used is dropped first. Not thread-safe.

    `at_first_use`: record each size when it is first used; for measurements and tests.
    """

    LIMIT = 256
    USES = 4
    PAUSE = 1.0

    _last_recorded_in_use = -PAUSE  # time.monotonic(), of all caches of this process

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled and device.type == "cuda"
        self.at_first_use = False
        self._sizes: dict[Hashable, SizedWork] = {}  # least recently used first
        self._waiting: dict[Hashable, SizedWork] = {}  # those to be recorded, in the order in which they came
        self._pool: Any = None

    def __len__(self) -> int:
        """Return the number of graphs."""
        return sum(work.recorded for work in self._sizes.values())

    @property
    def unrecorded(self) -> int:
        """Number of sizes that can still be recorded."""
        return len(self._waiting)

    def plan(self, key: Hashable, make: Callable[[], SizedWork]) -> None:
        """Add a size to be recorded."""
        if self.enabled and key not in self._sizes:
            self._add(key, make())

    def use(self, key: Hashable, make: Callable[[], SizedWork]) -> SizedWork:
        """Return the work of a size that is about to be run. Must be called before its inputs are written,
        because it may record the size."""
        if not self.enabled:
            return make()
        work = self._sizes.pop(key, None)
        if work is None:
            work = self._add(key, make())
        self._sizes[key] = work
        if key in self._waiting:
            work.uses += 1
            if self.at_first_use:
                self.record(key)
            elif work.uses > self.USES and self._may_delay():
                self.record(key)
                GraphCache._last_recorded_in_use = time.monotonic()
        return work

    def record_next(self) -> bool:
        """Record a size; return False if there was none to record. The current stream must not be the default
        one."""
        if not self._waiting:
            return False
        self.record(max(self._waiting, key=lambda key: self._waiting[key].uses))
        return True

    @torch.inference_mode()
    def record(self, key: Hashable) -> None:
        """Record a size that was planned or used, unless that has been tried. Raises if the device has
        failed."""
        work = self._waiting.pop(key, None)
        if work is None:
            return
        try:
            work.record(self._shared_pool)
        except Exception as error:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises if only a new process can continue
            log.warning("size %s runs without a CUDA graph, which cannot be recorded: %s", key, error)

    def clear(self) -> None:
        """Forget all sizes and free the memory of their graphs."""
        self._sizes.clear()
        self._waiting.clear()
        self._pool = None

    def _add(self, key: Hashable, work: SizedWork) -> SizedWork:
        if len(self._sizes) >= self.LIMIT:
            oldest = next(iter(self._sizes))
            del self._sizes[oldest]
            self._waiting.pop(oldest, None)
        self._sizes[key] = self._waiting[key] = work
        return work

    def _may_delay(self) -> bool:
        return time.monotonic() - GraphCache._last_recorded_in_use >= self.PAUSE

    def _shared_pool(self) -> Any:
        if self._pool is None or not len(self):  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def capture(function: Callable[[], Any], pool: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record the kernels that `function` queues on the current stream, without running them. `pool`: returns
    the memory pool for its allocations. Returns the graph and the function's result."""
    graph, handle = torch.cuda.CUDAGraph(), pool()
    # Not torch.cuda.graph(), which empties the allocator's cache each time. thread_local: other threads
    # of the process may allocate and launch in the meantime.
    torch.cuda.current_stream().synchronize()
    graph.capture_begin(pool=handle, capture_error_mode="thread_local")
    try:
        result = function()
        graph.capture_end()
    except BaseException:
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        # After an invalid capture, some versions of PyTorch go on allocating from the pool, whose memory
        # belongs to the other graphs.
        with contextlib.suppress(RuntimeError):
            torch.cuda.memory._cuda_endAllocateToPool(torch.cuda.current_device(), handle)
        raise
    return graph, result
