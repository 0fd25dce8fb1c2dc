"""A minimal CUDA client: initialises the driver, creates a context and allocates some memory.

`python -m light_tts.server.supervision.mps_probe` exits with code 0 if that works, otherwise prints why. With
an MPS daemon that is broken or busy with another user, this process fails or hangs instead of a stage.
"""

from __future__ import annotations

import ctypes
import sys


def main() -> None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        sys.exit(str(error))

    def call(name: str, *arguments: object) -> None:
        code = getattr(cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            cuda.cuGetErrorName(code, ctypes.byref(text))
            sys.exit(f"{name}: {(text.value or b'error').decode()} ({code})")

    device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(1024))
    call("cuMemFree_v2", memory)
    call("cuDevicePrimaryCtxRelease_v2", device)


if __name__ == "__main__":
    main()
