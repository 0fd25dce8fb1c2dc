"""How far the device may run ahead before the host reads its results."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoundPace:
    """`round_steps`: maximum number of decode steps per launch; `ahead`: number of launches queued before the
    results of one are read."""

    round_steps: int
    ahead: int


def choose_pace(device: torch.device, round_steps: int) -> RoundPace:
    """Return the pace for a device. A GPU must never wait for the host, so there is one round of
    `round_steps` queued ahead. On a CPU nothing is gained by running ahead, and tokens are needed at once."""
    if device.type == "cpu":
        return RoundPace(round_steps=1, ahead=0)
    return RoundPace(round_steps=round_steps, ahead=1)
