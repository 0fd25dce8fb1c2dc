"""Applies config/memory_config.py in a stage process."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from light_tts.common import gpu
from light_tts.server.core.settings import Settings
from light_tts.server.core.styles import load_styles

FILE = Path("config", "memory_config.py")


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
    if _uses_gpu(settings, stage):
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", load_config().ALLOCATOR)


def share(settings: Settings, stage: str, index: int) -> None:
    """Limit this process to its share of its GPU; does nothing on the CPU. Imports torch."""
    if not _uses_gpu(settings, stage):
        return
    config = load_config()

    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return
    device = 0 if stage == "llm" else index % gpus
    sharing = config.processes_on_gpu(
        device, gpus, len(load_styles(settings.model_dir)), settings.decode_process_num
    )
    config.optimize_gpu_memory(device, sharing)


def _uses_gpu(settings: Settings, stage: str) -> bool:
    return stage in ("llm", "decode") and settings.device != "cpu" and gpu.visible_gpus() > 0
