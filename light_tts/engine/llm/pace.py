"""How far the device may run before the host looks at what it has drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from light_tts.server.core.settings import Settings


@dataclass(frozen=True)
class Pace:
    """`round_steps`: most decode steps begun at once; `ahead`: launches begun before the results of one are
    looked at."""

    round_steps: int
    ahead: int


def choose_pace(settings: Settings, device: torch.device) -> Pace:
    """A GPU is never kept waiting for the host; on a CPU both are the same, and tokens are wanted at once."""
    if device.type == "cpu":
        return Pace(round_steps=1, ahead=0)
    return Pace(round_steps=settings.router_max_wait_tokens, ahead=1)
