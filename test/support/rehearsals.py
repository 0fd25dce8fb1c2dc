"""Launches on a fake GPU, rehearsed and real; prints as JSON what came of them. The part of
test_compile_ahead.py that needs a process without Triton's interpreter."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from light_tts.kernels import compile_ahead as module
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.cuda.kernel import Kernel
from support.fake_gpu import FakeGpu

DEVICE = torch.device("cuda", 0)
TENSOR = torch.zeros(64)


@triton.jit
def scale(x, factor, OUT: tl.constexpr):
    at = x + tl.arange(0, 16)
    tl.store(at, (tl.load(at) * factor).to(OUT).to(x.dtype.element_ty))


@triton.jit
def add(x, y, count, NEGATIVE: tl.constexpr, OVERLAP: tl.constexpr = False):
    i = tl.arange(0, 16)
    value = tl.load(x + i, mask=i < count)
    if y is not None:
        value += tl.load(y + i, mask=i < count)
    tl.store(x + i, -value if NEGATIVE else value, mask=i < count)


@triton.jit
def wrong(x):
    tl.static_assert(False, "this one cannot be compiled")


def launch_known() -> None:
    add[(1,)](TENSOR, TENSOR, 1, NEGATIVE=True)


def launch_all() -> None:
    """The known one and six others, with arguments and options of all kinds that ours have, all twice."""
    for _ in range(2):
        launch_known()
        add[(1,)](TENSOR, None, 16, NEGATIVE=False)
        add[(1,)](TENSOR, TENSOR[1:], 5, NEGATIVE=False, num_stages=1)
        add[lambda _: (1,)](TENSOR, None, 5, NEGATIVE=False, OVERLAP=True, launch_pdl=True)
        scale[(1,)](TENSOR, 2.0, OUT=tl.float16)
        scale[(1,)](TENSOR.half(), 3.0, OUT=tl.float32, num_warps=1)
        scale[(1,)](TENSOR, 2.0, OUT=tl.float16, enable_fp_fusion=False)


def launch_right() -> None:
    scale[(1,)](TENSOR, 2.0, OUT=tl.bfloat16)


def launch_wrong_and_right() -> None:
    wrong[(1,)](TENSOR)
    launch_right()


class CudaKernel(Kernel):
    """One in CUDA C++ whose preparation is only counted, or fails."""

    def __init__(self, gpu: FakeGpu, name: str) -> None:
        super().__init__(Path(f"{name}.cu"), name, DEVICE, threads=32)
        self.gpu = gpu

    def prepare(self) -> None:
        if self._name == "wrong":
            raise RuntimeError("nor can this one")
        self.gpu.compiled.append(self._name)
        self._function = object()


class Parameters(ctypes.Structure):
    pass


def launch_cuda(*kernels: CudaKernel) -> None:
    for kernel in kernels * 2:
        kernel.launch((1, 1, 1), Parameters())
        launch_known()


def main() -> None:
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(message)s")
    module.PROGRESS_SECONDS = 0.02
    gpu, found = FakeGpu(), {}
    launch_known()
    found["known"] = gpu.counted()
    compile_ahead(DEVICE, launch_all)
    found["rehearsal"] = gpu.counted()
    launch_all()
    found["launches"] = gpu.counted()
    compile_ahead(DEVICE, launch_all)
    found["second rehearsal"] = gpu.counted()
    try:
        compile_ahead(DEVICE, launch_wrong_and_right)
    except triton.CompilationError as error:
        found["error"] = str(error)
    launch_right()
    found["with an error"] = gpu.counted()
    compile_ahead(torch.device("cpu"), launch_wrong_and_right)
    found["without a GPU"] = gpu.counted()
    right = CudaKernel(gpu, "right")
    compile_ahead(DEVICE, lambda: launch_cuda(right))
    compile_ahead(DEVICE, lambda: launch_cuda(right))
    found["in CUDA C++"] = gpu.counted()
    try:
        compile_ahead(DEVICE, lambda: launch_cuda(CudaKernel(gpu, "wrong"), CudaKernel(gpu, "another")))
    except RuntimeError as error:
        found["error in CUDA C++"] = str(error)
    found["in CUDA C++, with an error"] = gpu.counted()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
