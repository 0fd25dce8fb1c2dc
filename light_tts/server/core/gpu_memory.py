"""Divides the memory of a GPU among the stage processes on it: applies config/memory_config.py, and chooses
the size of the flow's cached state."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from light_tts.common import gpu
from light_tts.server.core.settings import Settings
from light_tts.server.core.styles import load_styles

if TYPE_CHECKING:
    import torch

FILE = Path("config", "memory_config.py")

# --flow_memory_gpu_mb auto, in bytes: what all decode processes on one GPU reserve together, and what each of
# them leaves for its weights, CUDA graphs and batches.
FLOW_MEMORY = 40_000 << 20
REST = 4 << 30


def config_file() -> Path:
    """Return the path of memory_config.py, in the repository or in the installed package."""
    package = Path(__file__).resolve().parents[2]
    return next(folder / FILE for folder in (package.parent, package) if (folder / FILE).exists())


def load_config() -> ModuleType:
    """Import and return the memory_config module."""
    spec = importlib.util.spec_from_file_location("memory_config", config_file())
    assert spec is not None and spec.loader is not None  # the file exists
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)
    return config


def choose_allocator(settings: Settings, stage: str) -> None:
    """Choose how torch allocates GPU memory. Must be called before torch is imported."""
    if uses_gpu(settings, stage):
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", load_config().ALLOCATOR)


def share(settings: Settings, stage: str, index: int) -> None:
    """Limit this process to its share of its GPU; does nothing on the CPU. Imports torch."""
    if not uses_gpu(settings, stage):
        return
    config = load_config()

    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return
    device = 0 if stage == "llm" else index % gpus
    config.optimize_gpu_memory(device, _processes(config, settings, device, gpus))


def flow_memory(settings: Settings, device: torch.device) -> int:
    """Return the bytes that this decode process is to reserve for the flow's cached state: those of
    --flow_memory_gpu_mb, or for auto what `automatic_flow_memory` says, 0 on the CPU. Imports torch."""
    if settings.flow_memory_gpu_mb != "auto":
        return settings.flow_memory_gpu_mb << 20
    if device.type != "cuda":
        return 0
    config = load_config()

    import torch

    free, total = torch.cuda.mem_get_info(device)
    gpus = torch.cuda.device_count()
    processes = _processes(config, settings, device.index, gpus)
    decode = config.processes_on_gpu(device.index, gpus, 0, settings.decode_process_num)
    fraction = config.memory_fraction(processes)
    return automatic_flow_memory(total, free, decode, total if fraction is None else int(fraction * total))


def automatic_flow_memory(total: int, free: int, decode: int, limit: int) -> int:
    """Return the bytes that one of `decode` decode processes on a GPU reserves for the flow's cached state.
    All of them together take at most FLOW_MEMORY and a fifth of the GPU. Each leaves at least half, and at
    least REST, of what it can allocate: `limit`, and its part of what is free. All values are in bytes."""
    available = min(limit, free // decode)
    together = min(FLOW_MEMORY, total // 5)
    return max(0, min(together // decode, available // 2, available - REST))


def _processes(config: ModuleType, settings: Settings, device: int, gpus: int) -> int:
    """Return the number of stage processes on GPU `device` of `gpus`."""
    styles = len(load_styles(settings.model_dir))
    return config.processes_on_gpu(device, gpus, styles, settings.decode_process_num)


def uses_gpu(settings: Settings, stage: str) -> bool:
    """Return whether the processes of this stage compute on a GPU. Imports no torch."""
    return stage in ("llm", "decode") and settings.device != "cpu" and gpu.visible_gpus() > 0
