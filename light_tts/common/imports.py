"""Imports large packages faster."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Context manager for imports. Python creates hundreds of thousands of objects that stay, and does not
    look through them for garbage, neither meanwhile (a tenth of the time to import PyTorch) nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
