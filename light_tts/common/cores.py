"""Whether threads may keep a core busy while they wait."""

from __future__ import annotations

import os

MANY = 8


def can_wait_awake() -> bool:
    """Return whether this process may use so many cores that some threads can wait without sleeping: waking
    them takes about 0.1 ms, and then their code runs several times slower at first. With fewer cores others
    would lack them."""
    return len(os.sched_getaffinity(0)) >= MANY
