"""Prepares the compilers while a process imports PyTorch.

Before Triton finds its first kernel in its cache, it hashes all of its own files, 0.5 GB, which takes 0.4 to
0.8 s. NVRTC is a library of 0.1 GB. For neither is Python's lock held all the time.
"""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)

_thread: threading.Thread | None = None


def prepare() -> None:
    """Start to prepare them in a thread, once per process. Imports Triton, but not torch."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_prepare, name="compilers", daemon=True)
        _thread.start()


def wait() -> None:
    """Wait until they are ready if `prepare` was called; otherwise the first kernel prepares them."""
    if _thread is not None:
        _thread.join()


def _prepare() -> None:
    try:
        from triton.runtime.cache import triton_key

        from light_tts.kernels.cuda import source

        triton_key()  # is remembered
        if source.nvrtc is not None:
            source.nvrtc_version()
    except Exception:  # whoever needs a compiler meets the same error and reports it
        log.debug("the compilers are not prepared", exc_info=True)
