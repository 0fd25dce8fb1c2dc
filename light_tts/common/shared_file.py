"""Read-only file mappings that keep no file open. Python's own `mmap` holds a file descriptor per mapping
(always before 3.13), so many small mappings exhaust the descriptors."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_file(fileno: int, size: int) -> memoryview:
    """Map the first `size` > 0 bytes of an open file read-only; the mapping lives as long as a view of it.
    Raises OSError."""
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fileno, 0)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    data = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(data, _libc.munmap, address, size).atexit = False
    return memoryview(data).cast("B").toreadonly()
