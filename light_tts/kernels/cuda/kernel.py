"""Loads and launches kernels compiled from CUDA C++."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from light_tts.kernels.cuda import source as sources

try:
    from cuda.bindings import driver
except ImportError:  # of a torch without CUDA
    driver = None

log = logging.getLogger(__name__)

_submit: Callable[[Kernel], None] | None = None  # while launches are rehearsed


@cache
def available(device: torch.device) -> bool:
    """Return whether kernels can be compiled for this device and run on it: an H100 or similar (compute
    capability 9.0), with NVRTC. Logs why not, once."""
    reason = _unavailable(device)
    if reason:
        log.info("no kernels in CUDA C++: %s", reason)
    return reason is None


def _unavailable(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "no GPU"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return "compute capability {}.{} instead of 9.0".format(*capability)
    if not hasattr(triton, "knobs"):
        return f"Triton {triton.__version__} is too old"
    if driver is None:
        return "the package cuda-bindings is not installed"
    try:
        sources.nvrtc_version()
    except RuntimeError as error:
        return f"NVRTC cannot be loaded: {error}"
    return None


class Kernel:
    """The kernel `name` of a source with the macros `defines`, for one GPU. Its blocks have `threads` threads
    and `shared_bytes` bytes of dynamic shared memory; the source states the size of a cluster
    (`__cluster_dims__`).

    Is compiled (if that version is not in the cache) and loaded by `prepare` or else by the first launch.
    """

    def __init__(
        self,
        source: Path,
        name: str,
        device: torch.device,
        *,
        threads: int,
        shared_bytes: int = 0,
        defines: Mapping[str, int] | None = None,
    ) -> None:
        self._source = source
        self._name = name
        self._device = device
        self._threads = threads
        self._shared_bytes = shared_bytes
        self._defines = defines or {}
        self._preparing = threading.Lock()
        self._function: Any = None

    def prepare(self) -> None:
        """Compile and load the kernel, if that has not been done. Not while a CUDA graph is recorded. Raises
        CompilationError."""
        with self._preparing:
            if self._function is None:
                arch = "sm_{}{}a".format(*torch.cuda.get_device_capability(self._device))
                binary = sources.cached_binary(self._source, self._defines, arch)
                with _context_of(self._device):
                    self._function = self._load(binary)

    def launch(self, grid: tuple[int, int, int], parameters: ctypes.Structure, overlap: bool = False) -> None:
        """Launch `grid` blocks on the current stream of the device, which must be the current device.

        `parameters`: what the kernel takes by value; may be changed or deleted as soon as this returns. Must
        have the layout of the kernel's struct, which is not checked.
        `overlap`: start before the previous kernel of the stream has ended (see overlap.py); the kernel must
        wait for it.
        """
        if _submit is not None:
            if self._function is None:
                _submit(self)
            return
        if self._function is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{self._name} was not prepared before a CUDA graph was recorded")
            self.prepare()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = torch.cuda.current_stream(self._device).cuda_stream
        if overlap:
            config.attrs = _overlapping()
            config.numAttrs = 1
        (error,) = driver.cuLaunchKernelEx(config, self._function, ((parameters,), (None,)), 0)
        if error:
            raise RuntimeError(f"{self._name} was not launched: {error.name}")

    def _load(self, binary: bytes) -> Any:
        module = self._checked(driver.cuModuleLoadData(binary))  # is never unloaded
        function = self._checked(driver.cuModuleGetFunction(module, self._name.encode()))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._checked(driver.cuFuncSetAttribute(function, most, self._shared_bytes))
        return function

    def _checked(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error:
            raise RuntimeError(f"{self._name} of {self._source} cannot be loaded: {error.name}")
        return values[0] if values else None


@contextlib.contextmanager
def rehearsing(submit: Callable[[Kernel], None]) -> Iterator[None]:
    """Context manager in which no launch does anything, except that `submit` is called with kernels that have
    not been prepared: at each of their launches."""
    global _submit
    _submit = submit
    try:
        yield
    finally:
        _submit = None


@cache
def _overlapping() -> list[Any]:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return [attribute]


@contextlib.contextmanager
def _context_of(device: torch.device) -> Iterator[None]:
    """Context manager in which this thread loads modules for the device, where torch finds them."""
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    _, handle = driver.cuDeviceGet(index)
    error, context = driver.cuDevicePrimaryCtxRetain(handle)
    if error:
        raise RuntimeError(f"no context of {device}: {error.name}")
    driver.cuCtxPushCurrent(context)
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()  # not released: torch may not use the context yet, and modules must stay
