"""The random numbers of light_tts/common/random.py inside a kernel, bit-identical."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, stream, counters):
    """seed, stream: int64; counters: (n,) int64 -> (n,) float32"""
    uniform = (_bits(seed, stream, counters).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


_COMPILED = tl.constexpr(isinstance(gumbel, triton.JITFunction))  # False in the interpreter


@triton.jit
def gumbel_estimate(seed, stream, counters):
    """`gumbel` to within 1e-4 but without float64, which is much faster."""
    LN_2: tl.constexpr = 0.6931471805599453
    drawn = _bits(seed, stream, counters)
    uniform = drawn.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    rest = (drawn ^ 0xFFFFFFFF).to(
        tl.float32
    ) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 1 - uniform
    near_one = rest * (1 + rest * (0.5 + rest * 0.33333333))  # rest is exact near 0
    return -LN_2 * _log2(tl.where(rest < 0.01, near_one, -LN_2 * _log2(uniform)))


@triton.jit
def _log2(x):
    """One instruction, whereas tl.log2 and tl.log take dozens; accurate to about 2^-22."""
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _bits(seed, stream, counters):
    """-> (n,) uint32"""
    key0, key1 = keys_of(seed, stream)
    return bits(key0, key1, counters)


@triton.jit
def keys_of(seed, stream):
    """Return the two keys, uint32, of all numbers of this seed and stream, int64."""
    key0 = _absorb(_absorb(tl.full([], 0x243F6A88, tl.uint32), seed), stream)
    key1 = _absorb(_absorb(tl.full([], 0x13198A2E, tl.uint32), seed), stream)
    return key0, key1


@triton.jit
def bits(key0, key1, counters):
    """Return 32 random bits, uint32, for each counter, int64."""
    low = _mix(counters.to(tl.uint32) ^ key0)
    return _mix(low + (counters >> 32).to(tl.uint32) + key1)


@triton.jit
def _absorb(state, value):
    """Return `state`, uint32, mixed with both words of `value`, int64."""
    GOLDEN: tl.constexpr = 0x9E3779B9
    state = _mix(state + value.to(tl.uint32) + GOLDEN)
    return _mix(state + (value >> 32).to(tl.uint32) + GOLDEN)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)
