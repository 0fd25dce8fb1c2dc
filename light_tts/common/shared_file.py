"""Read-only mappings of files that keep no file open. Python's own `mmap` holds a file descriptor for each
mapping (before 3.13 always), so that many small mappings run out of descriptors."""

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
    """The first `size` > 0 bytes of the open file, read-only; mapped as long as a view is kept. Raises
    OSError."""
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fileno, 0)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    data = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(data, _libc.munmap, address, size).atexit = False
    return memoryview(data).cast("B").toreadonly()
