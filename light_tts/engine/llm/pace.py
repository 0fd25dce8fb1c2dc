"""How far the device may run before the host looks at what it has drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoundPace:
    """`round_steps`: most decode steps begun at once; `ahead`: launches begun before the results of one are
    looked at."""

    round_steps: int
    ahead: int


def choose_pace(device: torch.device, round_steps: int) -> RoundPace:
    """A GPU is never kept waiting for the host: rounds of `round_steps`, one of them ahead. On a CPU both are
    the same, and tokens are wanted at once."""
    if device.type == "cpu":
        return RoundPace(round_steps=1, ahead=0)
    return RoundPace(round_steps=round_steps, ahead=1)
