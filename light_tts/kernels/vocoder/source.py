"""The excitation of the vocoder from its pitch: phases per frame, then samples with their noise.

The noise has the bits of `light_tts.common.random.normal`, so that it is the same on every device.
Multiplications and additions are not fused: phases are large, and their rounding is visible in the signal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.common import random
from light_tts.kernels.random import bits, keys_of

BLOCK = 256


@dataclass(frozen=True)
class Voicing:
    """Parameters of the source module; frame: samples per mel frame."""

    sample_rate: int
    frame: int
    amplitude: float
    noise_level: float
    threshold: float


@dataclass(frozen=True)
class Draws:
    """Seeds of each item's noise, all (batch,) int64: seed, stream and first counter of the hash; `noisy`: 0
    for an item without noise."""

    seed: Tensor
    stream: Tensor
    counter: Tensor
    noisy: Tensor


@dataclass(frozen=True)
class Cached:
    """Samples that the source starts with. source: (batch, most) float32; count: (batch,) int64, number of
    valid ones."""

    source: Tensor
    count: Tensor


def source_phase(f0: Tensor, lengths: Tensor, voicing: Voicing, out: Tensor) -> None:
    """f0: (batch, frames) in Hz; lengths: (batch,) int32; out: (batch, frames, waves) float32: the phase of
    each harmonic at each frame, in radians. The cumulative sum is computed in float64 and rounded once."""
    batch, frames, waves = out.shape
    _source_phase_kernel[(batch,)](
        f0,
        lengths,
        out,
        frames,
        float(voicing.sample_rate),
        float(voicing.frame),
        WAVES=waves,
        BLOCK=32,
        BLOCK_WAVES=triton.next_power_of_2(waves),
        num_warps=4,
        enable_fp_fusion=False,
    )


def source_phase_reference(f0: Tensor, lengths: Tensor, voicing: Voicing, out: Tensor) -> None:
    multiples = torch.arange(1, out.shape[2] + 1, device=f0.device)
    inside = torch.arange(f0.shape[1], device=f0.device) < lengths[:, None]
    turns = f0.unsqueeze(2) * multiples / voicing.sample_rate % 1
    total = torch.cumsum(turns.double(), dim=1).float() * (2 * math.pi) * voicing.frame
    out[inside] = total[inside]


def source_samples(
    f0: Tensor,
    phase: Tensor,
    lengths: Tensor,
    weight: Tensor,
    bias: Tensor,
    voicing: Voicing,
    draws: Draws,
    cached: Cached,
    out: Tensor,
) -> None:
    """f0: (batch, frames); phase: (batch, frames, waves) from `source_phase`; lengths: (batch,) int32;
    weight: (waves,) and bias: (1,) mix the harmonics; out: (batch, samples) float32, written up to an item's
    end."""
    batch, frames, waves = phase.shape
    samples = out.shape[1]
    _source_samples_kernel[(triton.cdiv(samples, BLOCK), batch)](
        f0,
        phase,
        lengths,
        weight,
        bias,
        draws.seed,
        draws.stream,
        draws.counter,
        draws.noisy,
        cached.source,
        cached.count,
        cached.source.shape[1],
        out,
        frames,
        samples,
        1.0 / voicing.frame,
        voicing.amplitude,
        voicing.noise_level,
        voicing.amplitude / 3,
        voicing.threshold,
        FRAME=voicing.frame,
        WAVES=waves,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


def source_samples_reference(
    f0: Tensor,
    phase: Tensor,
    lengths: Tensor,
    weight: Tensor,
    bias: Tensor,
    voicing: Voicing,
    draws: Draws,
    cached: Cached,
    out: Tensor,
) -> None:
    waves = phase.shape[2]
    for row, length in enumerate(lengths.tolist()):
        samples = length * voicing.frame
        if not samples:
            continue
        own = phase[row, :length].T[None]
        own = torch.nn.functional.interpolate(own, scale_factor=float(voicing.frame), mode="linear")[0].T
        voiced = (f0[row, :length] > voicing.threshold).float().repeat_interleave(voicing.frame)[:, None]
        mixed = voicing.amplitude * torch.sin(own) * voiced
        if draws.noisy[row]:
            counters = draws.counter[row] + torch.arange(samples * waves, device=f0.device)
            noise = random.normal(draws.seed[row], draws.stream[row], counters).view(samples, waves)
            mixed = mixed + noise * (voiced * voicing.noise_level + (1 - voiced) * voicing.amplitude / 3)
        out[row, :samples] = torch.tanh(mixed @ weight + bias)
        count = min(int(cached.count[row]), samples)
        out[row, :count] = cached.source[row, :count]


@triton.jit
def turns_of(pitch, multiple, rate):
    """Return the turns of each harmonic in one sample (len(pitch), len(multiple)), float64 but rounded to
    float32. rate: the sample rate, float32 of that shape."""
    turns = tl.div_rn(pitch[:, None] * multiple[None, :], rate)
    return (turns - tl.floor(turns)).to(tl.float64)


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _source_phase_kernel(
    f0_ptr,
    lengths_ptr,
    out_ptr,
    frames,
    sample_rate,
    samples_per_frame,
    WAVES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WAVES: tl.constexpr,
):
    item = tl.program_id(0)
    length = tl.load(lengths_ptr + item)
    wave = tl.arange(0, BLOCK_WAVES)
    multiple = (wave + 1).to(tl.float32)
    base = tl.zeros((BLOCK_WAVES,), dtype=tl.float64)
    for start in range(0, length, BLOCK):
        frame = start + tl.arange(0, BLOCK)
        pitch = tl.load(f0_ptr + item * frames + frame, mask=frame < length, other=0.0)
        rate = tl.zeros((BLOCK, BLOCK_WAVES), dtype=tl.float32) + sample_rate
        turns = turns_of(pitch, multiple, rate)
        total = base[None, :] + tl.cumsum(turns, axis=0)
        tl.store(
            out_ptr + (item * frames + frame).to(tl.int64)[:, None] * WAVES + wave[None, :],
            total.to(tl.float32) * 6.283185307179586 * samples_per_frame,
            mask=(frame < length)[:, None] & (wave < WAVES)[None, :],
        )
        base += tl.sum(turns, axis=0)


@triton.jit
def _uniform(key0, key1, counter):
    """`random._uniform64`: float64 in (0, 1)."""
    return (bits(key0, key1, counter).to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _source_samples_kernel(
    f0_ptr,
    phase_ptr,
    lengths_ptr,
    weight_ptr,
    bias_ptr,
    seeds_ptr,
    streams_ptr,
    counters_ptr,
    noisy_ptr,
    cached_ptr,
    cached_counts_ptr,
    cached_capacity,
    out_ptr,
    frames,
    samples,
    frames_per_sample,
    amplitude,
    noise_voiced,
    noise_unvoiced,
    threshold,
    FRAME: tl.constexpr,
    WAVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(1)
    length = tl.load(lengths_ptr + item)
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = sample < length * FRAME
    if tl.program_id(0) * BLOCK >= length * FRAME:
        return

    # linear interpolation between frame centres, as in torch
    place = tl.maximum((sample.to(tl.float32) + 0.5) * frames_per_sample - 0.5, 0.0)
    left = place.to(tl.int32)
    share = place - left.to(tl.float32)
    own = phase_ptr + item.to(tl.int64) * frames * WAVES
    before = own + left * WAVES
    after = own + tl.minimum(left + 1, length - 1) * WAVES

    pitch = tl.load(f0_ptr + item.to(tl.int64) * frames + sample // FRAME, mask=inside, other=0.0)
    voiced = pitch > threshold
    noise_level = tl.where(voiced, noise_voiced, noise_unvoiced)
    draws = tl.load(noisy_ptr + item) != 0
    seed = tl.load(seeds_ptr + item)
    stream = tl.load(streams_ptr + item)
    key0, key1 = keys_of(seed, stream)
    first = 2 * (tl.load(counters_ptr + item) + sample.to(tl.int64) * WAVES)
    total = tl.zeros((BLOCK,), dtype=tl.float32) + tl.load(bias_ptr)
    for wave in range(WAVES):
        angle = (1.0 - share) * tl.load(before + wave, mask=inside, other=0.0)
        angle += share * tl.load(after + wave, mask=inside, other=0.0)
        value = tl.where(voiced, amplitude * tl.sin(angle), 0.0)
        if draws:
            radius = tl.sqrt(-2.0 * tl.log(_uniform(key0, key1, first + 2 * wave)))
            turn = 6.283185307179586 * _uniform(key0, key1, first + (2 * wave + 1))
            value += (radius * tl.cos(turn)).to(tl.float32) * noise_level
        total += value * tl.load(weight_ptr + wave)
    result = tanh(total)
    old = sample < tl.load(cached_counts_ptr + item)
    result = tl.where(
        old, tl.load(cached_ptr + item.to(tl.int64) * cached_capacity + sample, mask=old, other=0.0), result
    )
    tl.store(out_ptr + item.to(tl.int64) * samples + sample, result, mask=inside)
