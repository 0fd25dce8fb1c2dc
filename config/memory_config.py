"""How the stage processes share the memory of a GPU. Read by each stage when it starts on one.

python config/memory_config.py        prints what each GPU holds now
"""

from __future__ import annotations

from typing import Any

# fraction: each process may allocate its equal share and no more, so that none starves another;
# free: whoever comes first takes what it wants.
SHARING_STRATEGY = "fraction"

# What stays for the CUDA contexts of the processes and for the display.
RESERVED_SHARE = 0.08

# PyTorch's allocator: growing segments leave fewer holes when lengths vary as they do here.
ALLOCATOR = "expandable_segments:True"


def processes_on_gpu(gpu: int, gpus: int, llm_processes: int, decode_processes: int) -> int:
    """Stage processes that compute on GPU `gpu` of `gpus`: every LLM is on GPU 0, decode d on d % gpus."""
    decode = sum(1 for index in range(decode_processes) if index % gpus == gpu)
    return decode + (llm_processes if gpu == 0 else 0)


def memory_fraction(processes: int) -> float | None:
    """Share of a GPU's memory for each of `processes` on it; None: no limit."""
    if SHARING_STRATEGY == "free":
        return None
    if SHARING_STRATEGY != "fraction":
        raise ValueError(f"config/memory_config.py: SHARING_STRATEGY {SHARING_STRATEGY!r} is unknown")
    return (1.0 - RESERVED_SHARE) / max(1, processes)


def optimize_gpu_memory(gpu: int = 0, processes: int = 1) -> float | None:
    """Prepare this process for a GPU that `processes` processes share -> the fraction of its memory that it
    may allocate (None: no limit). Tensors handed to other processes travel as files from now on, and
    PyTorch's cache is given back. Without CUDA only the former."""
    import torch

    torch.multiprocessing.set_sharing_strategy("file_system")
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    fraction = memory_fraction(processes)
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction, gpu)
    return fraction


def monitor_gpu_memory() -> list[dict[str, Any]]:
    """For each GPU: index, name, total, used and free bytes, and the bytes each process uses by pid (through
    NVML; an empty list where there is no driver)."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package or no driver: nothing to watch
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            found.append(
                {
                    "index": index,
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "total": memory.total,
                    "used": memory.used,
                    "free": memory.free,
                    "processes": {entry.pid: entry.usedGpuMemory for entry in running},
                }
            )
        return found
    finally:
        pynvml.nvmlShutdown()


def main() -> None:
    gpus = monitor_gpu_memory()
    if not gpus:
        print("no NVIDIA GPU")
    for gpu in gpus:
        used, total = gpu["used"] / 2**30, gpu["total"] / 2**30
        print(f"GPU {gpu['index']} {gpu['name']}: {used:.1f} of {total:.1f} GiB used")
        for pid, size in gpu["processes"].items():
            print(f"  pid {pid}: {(size or 0) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
