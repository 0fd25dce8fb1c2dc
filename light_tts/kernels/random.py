"""The numbers of light_tts/common/random.py inside a kernel, with the same bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, stream, counters):
    """seed, stream: int64; counters: (n,) int64 -> (n,) float32"""
    uniform = (_bits(seed, stream, counters).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def gumbel_estimate(seed, stream, counters):
    """`gumbel` within 1e-4, without float64: much faster."""
    bits = _bits(seed, stream, counters)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - uniform, exact near 0
    near_one = rest * (1 + rest * (0.5 + rest * 0.33333333))
    return -tl.log(tl.where(rest < 0.01, near_one, -tl.log(uniform)))


@triton.jit
def _bits(seed, stream, counters):
    """-> (n,) uint32"""
    key0 = _absorb(_absorb(tl.full([], 0x243F6A88, tl.uint32), seed), stream)
    key1 = _absorb(_absorb(tl.full([], 0x13198A2E, tl.uint32), seed), stream)
    low = _mix(counters.to(tl.uint32) ^ key0)
    return _mix(low + (counters >> 32).to(tl.uint32) + key1)


@triton.jit
def _absorb(state, value):
    """`state`, uint32, stirred with both words of `value`, int64."""
    GOLDEN: tl.constexpr = 0x9E3779B9
    state = _mix(state + value.to(tl.uint32) + GOLDEN)
    return _mix(state + (value >> 32).to(tl.uint32) + GOLDEN)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)
