"""Compiles CUDA C++ with NVRTC, a library that is installed with torch. No GPU and no CUDA toolkit is needed,
but there are no headers of the toolkit either."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton

try:
    from cuda.bindings import nvrtc
except ImportError:  # of a torch without CUDA
    nvrtc = None

log = logging.getLogger(__name__)

OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"(.+?)"', re.MULTILINE)


class CompilationError(Exception):
    """The compiler rejects a source; says where and why."""


def cached_binary(source: Path, defines: Mapping[str, int], arch: str) -> bytes:
    """Return what `compile_source` returns. It is stored in the folder light_tts of Triton's cache until the
    source, a file that it includes, an option or NVRTC changes."""
    path = Path(triton.knobs.cache.dir) / "light_tts" / f"{source.stem}-{_key(source, defines, arch)}.cubin"
    if path.exists():
        return path.read_bytes()
    binary = compile_source(source, defines, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{uuid.uuid4().hex}.part")  # other processes may do the same
    part.write_bytes(binary)
    part.replace(path)
    return binary


def compile_source(source: Path, defines: Mapping[str, int], arch: str = "sm_90a") -> bytes:
    """Return the machine code (a CUBIN) of a source's kernels for GPUs of the architecture `arch`, with the
    macros `defines`. Raises CompilationError."""
    name = os.fsencode(source.resolve())  # files are included relative to its folder
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), name, 0, [], []))
    try:
        options = _options(defines, arch)
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        output = _room(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, output))
        text = output.rstrip(b"\0").decode(errors="replace").strip()
        if error:
            raise CompilationError(f"{source} cannot be compiled: {error.name}\n{text}".rstrip())
        if text:
            log.info("%s: %s", source, text)
        binary = _room(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _room(size: int) -> bytes:
    """Return bytes for NVRTC to write to. At least two, because Python has only one object for each single
    byte: if the log was empty, its end overwrote that of all spaces in this process."""
    return bytes(max(2, size))


def _options(defines: Mapping[str, int], arch: str) -> list[bytes]:
    macros = [f"--define-macro={name}={value}" for name, value in sorted(defines.items())]
    return [option.encode() for option in (*OPTIONS, f"--gpu-architecture={arch}", *macros)]


def _key(source: Path, defines: Mapping[str, int], arch: str) -> str:
    """Return a name for everything that the machine code depends on."""
    digest = hashlib.sha256(repr((nvrtc_version(), _options(defines, arch))).encode())
    for file in _with_included(source.resolve()):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def nvrtc_version() -> tuple[int, int]:
    """Return the version of the compiler. Raises RuntimeError if its library cannot be loaded."""
    error, major, minor = nvrtc.nvrtcVersion()
    _checked((error,))
    return major, minor


def _with_included(source: Path) -> Iterator[Path]:
    """The file and the files that it includes, directly or not, each once. One that does not exist is left to
    the compiler, which may not need it."""
    known, waiting = {source}, [source]
    while waiting:
        file = waiting.pop()
        yield file
        for name in _INCLUDE.findall(file.read_bytes()):
            included = (file.parent / os.fsdecode(name)).resolve()
            if included not in known and included.exists():
                known.add(included)
                waiting.append(included)


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the value that a function of NVRTC returned, if it succeeded."""
    error, *values = result
    if error:
        raise RuntimeError(f"NVRTC failed: {error.name}")
    return values[0] if values else None
