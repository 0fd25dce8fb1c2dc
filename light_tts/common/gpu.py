"""GPUs: how many there are, and which one a process uses. The one place where CUDA is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Priorities of CUDA streams, also among the clients of one MPS server: lower goes first. Bulk work of the
# decode stage makes room for the language model, which everybody waits for; what is short goes before both.
BULK, LANGUAGE_MODEL, URGENT = 0, -1, -2

if TYPE_CHECKING:
    import torch

    from light_tts.server.core.settings import Settings


class DeviceError(RuntimeError):
    """The device that was asked for is not there."""


def choose_device(settings: Settings, index: int = 0) -> tuple[torch.device, torch.dtype]:
    """Device and number type for process `index` of a stage: GPU `index % GPUs`, or the CPU in float32.

    The LLM always passes 0. Raises DeviceError for `--device cuda` where torch sees no GPU.
    """
    import torch

    gpus = torch.cuda.device_count() if settings.device != "cpu" and torch.cuda.is_available() else 0
    if not gpus:
        if settings.device == "cuda":
            raise DeviceError("--device cuda was given but torch sees no CUDA device on this machine")
        return torch.device("cpu"), torch.float32
    device = torch.device("cuda", index % gpus)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it already does for matrix products
    return device, getattr(torch, settings.data_type)


def visible_gpus() -> int:
    """GPUs that the driver shows (through NVML, without torch): for messages and estimates only."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a driver that does not answer: no GPU for us
        return 0
    try:
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0
    finally:
        pynvml.nvmlShutdown()
