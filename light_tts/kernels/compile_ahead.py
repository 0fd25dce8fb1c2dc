"""Compiling kernels before they are launched, many at the same time.

Triton compiles a kernel at its first launch, which waits for it: a start that meets a hundred of them takes
minutes, in which one core works. So what the start is about to run is rehearsed: each launch only hands its
kernel to a pool of threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

log = logging.getLogger(__name__)

MOST_THREADS = 16  # about a fifth of a compilation holds Python's lock: more would only wait for it
PROGRESS_SECONDS = 10.0


def compile_ahead(device: torch.device, rehearse: Callable[[], None]) -> None:
    """Compiles and loads the kernels that `rehearse` launches. It is called once, but launches none of them:
    what they would write is left as it is, so it must not use that as an index, nor read it on the host. All
    its other operations run. Raises what the compilation of a kernel raises, when all others have ended.

    Without a GPU, in Triton's interpreter and with an old Triton nothing happens: then kernels are compiled
    when they are launched, if at all. No other thread may launch a kernel meanwhile."""
    if device.type != "cuda" or not hasattr(triton, "AsyncCompileMode") or triton.knobs.runtime.interpret:
        return
    started = time.monotonic()
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(threads, "compile", initializer=torch.cuda.set_device, initargs=(device,))
    # errors are raised below: raised by the mode, they would leave it active
    with pool, _Compilations(pool, ignore_errors=True) as compilations:
        with _launching_nothing():
            rehearse()
        _wait(compilations.raw_futures)
    for kernel in compilations.raw_futures:
        kernel.result()
    if kernels := len(compilations.raw_futures):
        log.info("compiled or found %d kernels in %.1f s", kernels, time.monotonic() - started)


class _Compilations(getattr(triton, "AsyncCompileMode", object)):
    """Those under way or done, each kernel's once."""

    def submit(
        self,
        key: Hashable,
        compile_kernel: Callable[[], CompiledKernel],
        keep: Callable[[CompiledKernel], None],
    ) -> object:
        """Called by Triton in place of `compile_kernel`; `keep` lets later launches find the kernel."""

        def prepare() -> CompiledKernel:
            kernel = compile_kernel()
            kernel._init_handles()  # as the first launch would; up to Triton 3.6 it calls a C compiler
            keep(kernel)  # not only in the end: a launch of a kernel that is not there yet takes long
            return kernel

        return super().submit(key, prepare, keep)


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    """A launch ends when its kernel is compiled, or on its way to be. Of any kernel, also of those that have
    long been there: they would read what the others have not written."""
    run = JITFunction.run

    def prepare(self: JITFunction, *args, grid, warmup: bool, **options) -> object:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = prepare
    try:
        yield
    finally:
        JITFunction.run = run


def _wait(kernels: Sequence[Future[CompiledKernel]]) -> None:
    while pending := wait(kernels, PROGRESS_SECONDS).not_done:
        log.info("compiling kernels: %d of %d", len(kernels) - len(pending), len(kernels))
