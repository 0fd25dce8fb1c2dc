"""Checks of this machine: processors, memory, GPUs, TensorRT, open files, disk space."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from light_tts import __version__
from light_tts.cli.findings import Findings
from light_tts.common.gpu import visible_gpus
from light_tts.server.core.host_memory import memory
from light_tts.server.core.rundir import SHARED_MEMORY

GB = 1e9
FEW_FILES = 4096
LITTLE_SHARED_MEMORY = 0.2  # GB; containers have 64 MB by default
LITTLE_DISK = 1.0  # GB


def look(findings: Findings) -> None:
    """Report everything that does not depend on a checkpoint."""
    findings.heading("This machine")
    findings.ok("Light-TTS", f"{__version__}, Python {platform.python_version()}, {_version_of('torch')}")
    usable = memory()
    free = min(usable, psutil.virtual_memory().available)
    findings.ok(
        "processors, memory",
        f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), "
        f"{free / GB:.1f} of {usable / GB:.1f} GB free",
    )
    _gpus(findings)
    _shared_memory(findings)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard != resource.RLIM_INFINITY and hard < FEW_FILES
    findings.add("note" if few else "ok", "open files", f"{soft}, can be raised to {hard}")


def disk(findings: Findings, what: str, directory: Path) -> None:
    """Report whether there is space in the file system of this directory, which may not exist yet."""
    place = directory.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GB
    writable = os.access(place, os.W_OK)
    text = f"{directory}: {free:.1f} GB free" + ("" if writable else ", cannot be written")
    findings.add("ok" if writable and free > LITTLE_DISK else "note", what, text)


def _version_of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _gpus(findings: Findings) -> None:
    import torch

    seen = visible_gpus()
    if not torch.cuda.is_available():
        why = (
            "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch cannot use them"
        )
        if seen:
            findings.fail(
                "GPUs", f"the driver shows {seen}, but {why}; pip install torch without a CPU index"
            )
        else:
            findings.note("GPUs", "none: everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        findings.ok(
            f"GPU {index}",
            f"{torch.cuda.get_device_name(index)}, {free / GB:.1f} of {total / GB:.1f} GB free",
        )
    triton = _version_of("triton")
    findings.add("bad" if triton.startswith("no") else "ok", "kernels", triton)
    tensorrt = _version_of("tensorrt")
    built_in = ": the built-in estimator is used (pip install '.[trt]' for --load_trt)"
    findings.add(
        *(("note", "TensorRT", tensorrt + built_in) if tensorrt[:2] == "no" else ("ok", "TensorRT", tensorrt))
    )


def _shared_memory(findings: Findings) -> None:
    free = shutil.disk_usage(SHARED_MEMORY).free / GB
    hint = "" if free > LITTLE_SHARED_MEMORY else "; in a container: --shm-size 1g"
    findings.add("note" if hint else "ok", "shared memory", f"{SHARED_MEMORY}: {free:.1f} GB free{hint}")
