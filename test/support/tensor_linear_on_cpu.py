"""Runs tensor_linear.cu on the emulator (cuda_on_cpu.py)."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import pytest
import torch

from light_tts.kernels.llm import tensor_linear
from light_tts.kernels.llm.tensor_linear import Variant
from support import cuda_on_cpu


class EmulatedKernel:
    """In the place of a `Kernel`. The threads of each launch run in another order."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        self._library = cuda_on_cpu.build(tensor_linear.SOURCE, ["tensor_linear"], variant.macros, folder)
        self._variant = variant
        self._seed = 0

    def launch(self, grid: tuple[int, int, int], params: ctypes.Structure, overlap: bool) -> None:
        cuda_on_cpu.launch(
            self._library,
            "tensor_linear",
            grid[:2],
            self._variant.shared_bytes,
            params,
            cluster=self._variant.splits,
            threads=32 * self._variant.warps,
            seed=self._seed,
        )
        self._seed += 1


class Emulator:
    """`kernel` replaces `tensor_linear._kernel`."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._built = cache(self._build)

    def kernel(self, device: torch.device, variant: Variant) -> EmulatedKernel:
        return self._built(variant)

    def _build(self, variant: Variant) -> EmulatedKernel:
        return EmulatedKernel(variant, self._folders.mktemp("kernel"))
