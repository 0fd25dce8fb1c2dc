"""Random numbers as a pure function of (seed, stream, counter).

The draws of a request do not depend on other requests in the batch, the device, or where it was interrupted.
The bits come from a 32-bit mixing hash, so that a kernel can reproduce them exactly. The logarithms and
cosines of `normal` and `gumbel` are computed in float64 and rounded once, so that different math libraries
agree in float32.

All functions take `seed` and `stream` as int or int64 tensor and `counters` as int64 tensor (the tensors
broadcast against each other), use the low 64 bits of each, and return float32 of the broadcast shape.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor, int | Tensor)  # an unsigned 32-bit number in an int or int64

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio; prevents zeros from mixing to zero


class Purpose(IntEnum):
    """The purpose of random numbers; each has streams of its own."""

    NUCLEUS = 1
    FALLBACK = 2
    SOURCE = 3


def stream_of(purpose: Purpose, part: Word) -> Word:
    """Return the stream of one part of a request for one purpose."""
    return part + (int(purpose) << 32)


def uniform(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    """Return uniform numbers in (0, 1), both ends excluded, in steps of 2^-23."""
    return ((_bits(seed, stream, counters) >> 9).float() + 0.5) * 2.0**-23


def gumbel(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    """Return standard Gumbel numbers: argmax of log p + gumbel is a sample from p."""
    return -torch.log(-torch.log(_uniform64(seed, stream, counters))).float()


def normal(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    """Return standard normal numbers (Box-Muller)."""
    radius = torch.sqrt(-2 * torch.log(_uniform64(seed, stream, 2 * counters)))
    angle = 2 * math.pi * _uniform64(seed, stream, 2 * counters + 1)
    return (radius * torch.cos(angle)).float()


def _uniform64(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    return (_bits(seed, stream, counters).double() + 0.5) * 2.0**-32


def _bits(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    """Return 32 random bits for each counter."""
    seed, stream = _plain(seed, counters), _plain(stream, counters)
    key0 = _absorb(0x243F6A88, seed, stream)  # initial values are digits of pi
    key1 = _absorb(0x13198A2E, seed, stream)
    low = _mix((counters & _MASK) ^ key0)
    return _mix((low + ((counters >> 32) & _MASK) + key1) & _MASK)


def _plain(value: int | Tensor, counters: Tensor) -> int | Tensor:
    """Return a single number in host memory as an int, which Python mixes ten times faster than torch does;
    any other value as it is."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
        return int(value) if value.dim() <= counters.dim() else value
    return value


def _absorb(initial: int, *values: int | Tensor) -> int | Tensor:
    """Return `initial` mixed with the low 64 bits of each value."""
    state: int | Tensor = initial
    for value in values:
        for word in (value & _MASK, (value >> 32) & _MASK):
            state = _mix((state + word + _GOLDEN) & _MASK)
    return state


def _mix(x: Word) -> Word:
    """Apply a low-bias bijection of 32-bit words (shifts and factors found with hash-prospector; both factors
    are below 2^31, so that the products fit in int64)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
