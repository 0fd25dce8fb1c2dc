"""A fake driver of an H100 that only counts launches. Triton's interpreter must be off."""

from __future__ import annotations

import threading
import time

import torch
import triton
from triton.backends.compiler import GPUTarget


class FakeGpu:
    """`compiled`, `launched`: names of kernels. Raises if a thread loads a kernel before it has selected the
    device. Must be installed before any kernel is launched; `compiles`: whether kernels are really compiled.
    """

    def __init__(self, compiles: bool = True) -> None:
        self.compiled: list[str] = []
        self.launched: list[str] = []
        self.utils = self
        self._threads: set[int] = set()
        triton.runtime.driver.set_active(self)
        if compiles:
            triton.knobs.compilation.listener = lambda src, **_: self.compiled.append(src.name)
        else:
            triton.compiler.compile = lambda src, **_: _Kernel(self, src.name)
        torch.cuda.set_device = lambda device: self._threads.add(threading.get_ident())
        torch.cuda.set_device(0)

    def counted(self) -> dict[str, list[str]]:
        """Return what was compiled and launched since the last call."""
        counted = {"compiled": sorted(self.compiled), "launched": sorted(self.launched)}
        self.compiled.clear()
        self.launched.clear()
        return counted

    # what Triton asks a driver

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        if threading.get_ident() not in self._threads:
            raise RuntimeError(f"{name} is loaded for whatever device")
        time.sleep(0.1)  # so that one can see the progress
        return object(), 1, 32, 0, 1024

    def launcher_cls(self, src: object, metadata: object) -> object:
        return lambda *_: self.launched.append(src.name)


class _Kernel:
    """In place of a compiled one."""

    function = packed_metadata = None

    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self._gpu, self._name = gpu, name
        gpu.compiled.append(name)

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *_: object) -> None:
        pass

    def run(self, *_: object) -> None:
        self._gpu.launched.append(self._name)
