"""GPU enumeration through the driver, and priorities of GPU work. No torch is imported here."""

from __future__ import annotations

from functools import cache

# CUDA stream priorities, also effective between clients of one MPS server; lower numbers run first. Bulk work
# of the decode stage yields to the language model, which every request waits for; short urgent work precedes
# both.
BULK, LANGUAGE_MODEL, URGENT = 0, -1, -2


@cache
def visible_gpus() -> int:
    """Return the number of GPUs that the driver reported when first asked (through NVML, without torch); for
    messages and estimates only."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a driver that does not answer: treated as no GPU
        return 0
    try:
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0
    finally:
        pynvml.nvmlShutdown()
