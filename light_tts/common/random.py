"""Random numbers that are a pure function of (seed, stream, counter).

Who else is in a batch, on which device it runs and where a request was interrupted never change what it
draws: the bits are those of a 32-bit mixing hash, so that a kernel can repeat them exactly. The logarithms
and cosines of `normal` and `gumbel` are taken in float64 and rounded once, so that different math libraries
agree in float32 as well.

All functions take `seed` and `stream` as int or int64 tensor and `counters` as int64 tensor (the tensors
broadcast against each other), use the low 64 bits of each, and return float32 of the broadcast shape.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)  # an unsigned 32-bit number, held in an int or int64

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: keeps a run of zeros from being mixed to zero


class Purpose(IntEnum):
    """What numbers are drawn for: each purpose has its own streams."""

    NUCLEUS = 1
    FALLBACK = 2
    SOURCE = 3


def stream_of(purpose: Purpose, part: Word) -> Word:
    """The stream of one part of a request for one purpose."""
    return part + (int(purpose) << 32)


def uniform(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    """Uniform in (0, 1), both ends excluded, in steps of 2^-23."""
    return ((_bits(seed, stream, counters) >> 9).float() + 0.5) * 2.0**-23


def gumbel(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    """Standard Gumbel: argmax of log p + gumbel is a draw from p."""
    return -torch.log(-torch.log(_uniform64(seed, stream, counters))).float()


def normal(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    """Standard normal (Box-Muller)."""
    radius = torch.sqrt(-2 * torch.log(_uniform64(seed, stream, 2 * counters)))
    angle = 2 * math.pi * _uniform64(seed, stream, 2 * counters + 1)
    return (radius * torch.cos(angle)).float()


def _uniform64(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    return (_bits(seed, stream, counters).double() + 0.5) * 2.0**-32


def _bits(seed: int | Tensor, stream: int | Tensor, counters: Tensor) -> Tensor:
    """32 random bits for each counter."""
    key0 = _absorb(0x243F6A88, seed, stream)  # the initial values are digits of pi
    key1 = _absorb(0x13198A2E, seed, stream)
    low = _mix((counters & _MASK) ^ key0)
    return _mix((low + ((counters >> 32) & _MASK) + key1) & _MASK)


def _absorb(state: int, *values: int | Tensor) -> int | Tensor:
    """`state` stirred with the low 64 bits of each value."""
    for value in values:
        for word in (value & _MASK, (value >> 32) & _MASK):
            state = _mix((state + word + _GOLDEN) & _MASK)
    return state


def _mix(x: Word) -> Word:
    """A bijection of 32-bit words with little bias (shifts and factors found by hash-prospector; both
    factors are below 2^31, so that the products fit int64)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
