"""Applies config/memory_config.py in a stage process."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from light_tts.server.core.settings import Settings
from light_tts.server.core.styles import load_styles
from light_tts.utils import gpu

CONFIG = Path(__file__).resolve().parents[2] / "config" / "memory_config.py"


def share(settings: Settings, stage: str, index: int) -> None:
    """Limit this process to its share of its GPU; nothing where it computes on the CPU, or where the package
    is installed without its config directory. To be called before the stage imports torch."""
    if stage not in ("llm", "decode") or settings.device == "cpu" or not gpu.visible_gpus():
        return
    if not CONFIG.exists():
        return
    spec = importlib.util.spec_from_file_location("memory_config", CONFIG)
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", config.ALLOCATOR)

    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return
    device = 0 if stage == "llm" else index % gpus
    sharing = config.processes_on_gpu(
        device, gpus, len(load_styles(settings.model_dir)), settings.decode_process_num
    )
    fraction = config.memory_fraction(sharing)
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction, device)
