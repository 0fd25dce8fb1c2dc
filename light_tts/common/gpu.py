"""GPUs as the driver shows them, and the priorities of work on one. No torch is imported here."""

from __future__ import annotations

# Priorities of CUDA streams, also among the clients of one MPS server: lower goes first. Bulk work of the
# decode stage makes room for the language model, which everybody waits for; what is short goes before both.
BULK, LANGUAGE_MODEL, URGENT = 0, -1, -2


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
