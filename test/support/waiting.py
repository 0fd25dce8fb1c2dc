"""Waits for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(
    condition: Callable[[], bool], seconds: float = 5.0, *, ignored: tuple[type[Exception], ...] = ()
) -> bool:
    """Return whether `condition` holds within this time. Exceptions of the kinds `ignored` mean: not yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return True
        except ignored:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
