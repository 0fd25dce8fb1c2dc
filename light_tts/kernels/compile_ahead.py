"""Compiles kernels in parallel before they are launched.

A kernel is compiled at its first launch, which waits for it. A start with a hundred new kernels would
take minutes on one core. So the work of the start is rehearsed: each launch only submits its kernel to a
thread pool.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from light_tts.kernels import compilers, launchers
from light_tts.kernels.cuda.kernel import Kernel, rehearsing

log = logging.getLogger(__name__)

MOST_THREADS = 16  # about a fifth of a compilation holds the GIL, so more threads would only wait for it
PROGRESS_SECONDS = 10.0


def compile_ahead(device: torch.device, rehearse: Callable[[], None]) -> None:
    """Compile and load the kernels that `rehearse` launches. It is called once, but its launches do nothing:
    output tensors keep their content, so it must not use them as indices or read them on the host. All its
    other operations run. Re-raises a compilation error once all compilations have ended.

    Does nothing without a GPU, in Triton's interpreter and with an old Triton; kernels are then compiled when
    they are launched. No other thread may launch a kernel in the meantime.
    """
    if device.type != "cuda" or not hasattr(triton, "AsyncCompileMode") or triton.knobs.runtime.interpret:
        return
    started = time.monotonic()
    compilers.wait()
    launchers.make_one_at_a_time()
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(threads, "compile", initializer=torch.cuda.set_device, initargs=(device,))
    cuda: dict[Kernel, Future[None]] = {}

    def submit(kernel: Kernel) -> None:
        if kernel not in cuda:
            cuda[kernel] = pool.submit(kernel.prepare)

    with pool, _compilations(pool) as compilations:
        with _launching_nothing(), rehearsing(submit):
            rehearse()
        kernels = [*compilations.raw_futures, *cuda.values()]
        _wait(kernels)
    for kernel in kernels:
        kernel.result()
    if kernels:
        log.info("compiled or found %d kernels in %.1f s", len(kernels), time.monotonic() - started)


def _compilations(pool: ThreadPoolExecutor) -> triton.AsyncCompileMode:
    """Return the compilations in progress or done, one per kernel. Needs a Triton with AsyncCompileMode."""

    class Compilations(triton.AsyncCompileMode):
        def submit(
            self,
            key: Hashable,
            compile_kernel: Callable[[], CompiledKernel],
            keep: Callable[[CompiledKernel], None],
        ) -> object:
            """Called by Triton instead of `compile_kernel`; `keep` makes the kernel available to later
            launches."""

            def prepare() -> CompiledKernel:
                kernel = compile_kernel()
                kernel._init_handles()  # as the first launch would; see launchers.py
                keep(kernel)  # immediately, because launching a kernel that is not available yet is slow
                return kernel

            return super().submit(key, prepare, keep)

    # Errors are raised by compile_ahead; raised by the mode, they would leave it active.
    return Compilations(pool, ignore_errors=True)


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    """Context manager in which launches return as soon as their kernel is compiled or submitted. This
    includes kernels compiled earlier, which would read data that the others have not written."""
    run = JITFunction.run

    def prepare(self: JITFunction, *args, grid, warmup: bool, **options) -> object:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = prepare
    try:
        yield
    finally:
        JITFunction.run = run


def _wait(kernels: Sequence[Future[Any]]) -> None:
    while pending := wait(kernels, PROGRESS_SECONDS).not_done:
        log.info("compiling kernels: %d of %d", len(kernels) - len(pending), len(kernels))
