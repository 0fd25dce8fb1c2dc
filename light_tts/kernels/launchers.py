"""Makes Triton's launchers one at a time.

Up to Triton 3.6 a launcher is a C extension for the signature of its kernel. All of them have the same name,
so if one is loaded again, Python returns the module of another, with the contents replaced. A thread that has
just loaded that other one then takes the function for the wrong signature: launches fail ("function takes
exactly 32 arguments") or pass numbers as addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triton.runtime import driver

_lock = threading.Lock()


@dataclass(frozen=True)
class _OneAtATime:
    make: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        with _lock:
            return self.make(*args)


def make_one_at_a_time() -> None:
    """From now on no two threads of this process make a launcher at the same time."""
    make = driver.active.launcher_cls
    if not isinstance(make, _OneAtATime):
        driver.active.launcher_cls = _OneAtATime(make)
