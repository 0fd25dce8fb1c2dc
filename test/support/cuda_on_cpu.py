"""Compiles CUDA kernels for the CPU and runs them there, see cuda_on_cpu.h."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
HEADERS = SUPPORT.parents[1] / "light_tts" / "kernels" / "cuda"
AVAILABLE = bool(shutil.which("g++")) and sys.platform == "linux" and platform.machine() == "x86_64"

_FLAGS = [
    # -Og: -O1 with the sanitizers takes twice as long to compile, and the kernels are hardly faster;
    # native: float16 is converted by an instruction, not by a function
    *("-std=c++17", "-Og", "-march=native", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-w"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=alignment,bounds"),
    "-ftrivial-auto-var-init=pattern",  # variables without a value hold a strange one, and always the same
]
_ENTRY = """
extern "C" __attribute__((visibility("default")))
const char* run_{0}(const cuda_on_cpu::Launch* launch, const void* params, size_t params_bytes) {{
  return cuda_on_cpu::run({0}, *launch, params, params_bytes);
}}
"""


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("grid_x", "grid_y", "cluster", "threads", "shared_bytes")),
        ("seed", ctypes.c_uint64),
    )


class KernelError(RuntimeError):
    """A kernel did what it must not do, or waits forever."""


def build(source: Path, kernels: Sequence[str], defines: dict[str, int | str], folder: Path) -> ctypes.CDLL:
    """The library, in `folder`, of the named kernels of a CUDA source; each takes one structure. The macros
    of `defines` are defined before it. RuntimeError with g++'s messages if it does not compile."""
    lines = ['#include "cuda_on_cpu.h"']
    lines += [f"#define {name} {value}" for name, value in defines.items()]
    lines += [f'#include "{source.resolve()}"', *(_ENTRY.format(kernel) for kernel in kernels)]
    wrapper, compiled, library = (folder / f"{source.stem}.{kind}" for kind in ("cpp", "o", "so"))
    wrapper.write_text("\n".join(lines))
    _gxx(*_FLAGS, "-I", SUPPORT, "-I", HEADERS, "-c", "-o", compiled, wrapper)
    _gxx("-shared", "-o", library, compiled, "-ldl")  # without -fsanitize, which would add its own library
    return ctypes.CDLL(str(library))


def _gxx(*arguments: str | Path) -> None:
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ fails:\n{done.stderr}")


def launch(
    library: ctypes.CDLL,
    kernel: str,
    grid: tuple[int, int],
    shared_bytes: int,
    params: ctypes.Structure,
    *,
    cluster: int = 8,
    threads: int = 256,
    seed: int = 0,
) -> None:
    """Run a kernel on `grid` blocks, `cluster` of them along x at a time, with `threads` threads each. The
    seed chooses the order in which threads run. KernelError says what the kernel did wrong."""
    run = getattr(library, f"run_{kernel}")
    run.restype = ctypes.c_char_p
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    how = _Launch(*grid, cluster, threads, shared_bytes, seed)
    message = run(ctypes.byref(how), ctypes.byref(params), ctypes.sizeof(params))
    if message is not None:
        raise KernelError(f"{kernel}, seed {seed}: " + _with_lines(message.decode()))


def _with_lines(message: str) -> str:
    """The message with lines of the source in place of `[library address]`."""

    def lines(found: re.Match[str]) -> str:
        if not shutil.which("addr2line"):
            return found[0]
        command = ["addr2line", "-i", "-e", found[1], found[2]]
        return "".join(f"\n  {line}" for line in subprocess.check_output(command, text=True).split("\n")[:-1])

    return re.sub(r" \[(\S+) (0x[0-9a-f]+)\]", lines, message)
