"""The excitation of the causal vocoder from its pitch, continued from earlier frames: phases, then samples.

The noise has the bits of `light_tts.common.random.uniform`, so that it is the same on every device. As in
source.py, multiplications and additions are not fused.
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
from light_tts.kernels.vocoder.source import BLOCK, Draws, Voicing, tanh, turns_of


@dataclass(frozen=True)
class Span:
    """The frames of each item whose source is computed, `begin` to `end`, both (batch,) int32."""

    begin: Tensor
    end: Tensor


def causal_phase(
    f0: Tensor, span: Span, before: Tensor, voicing: Voicing, out: Tensor, after: Tensor
) -> None:
    """f0: (batch, frames) in Hz; before, after: (batch, waves) float64, the sums of turns before the span and
    at its end; out: (batch, frames, waves) float32, the phase of each harmonic in radians, written in the
    span. Sums are computed in float64, and rounded to float32 for the phase."""
    batch, frames, waves = out.shape
    _causal_phase_kernel[(batch,)](
        f0,
        span.begin,
        span.end,
        before,
        out,
        after,
        frames,
        float(voicing.sample_rate),
        float(voicing.frame),
        WAVES=waves,
        BLOCK=32,
        BLOCK_WAVES=triton.next_power_of_2(waves),
        num_warps=4,
        enable_fp_fusion=False,
    )


def causal_phase_reference(
    f0: Tensor, span: Span, before: Tensor, voicing: Voicing, out: Tensor, after: Tensor
) -> None:
    multiples = torch.arange(1, out.shape[2] + 1, device=f0.device)
    for row, (begin, end) in enumerate(zip(span.begin.tolist(), span.end.tolist(), strict=True)):
        turns = (f0[row, begin:end, None] * multiples / voicing.sample_rate % 1).double()
        total = torch.cat([before[row, None], turns]).cumsum(dim=0)
        out[row, begin:end] = total[1:].float() * (2 * math.pi) * voicing.frame
        after[row] = total[-1]


def causal_samples(
    f0: Tensor,
    phase: Tensor,
    span: Span,
    weight: Tensor,
    bias: Tensor,
    voicing: Voicing,
    draws: Draws,
    out: Tensor,
) -> None:
    """f0: (batch, frames); phase: (batch, frames, waves) from `causal_phase`; weight: (waves,) and bias: (1,)
    mix the harmonics; draws: `counter` is that of the sample before all frames; out: (batch, samples)
    float32, written in the span."""
    batch, frames, waves = phase.shape
    samples = out.shape[1]
    _causal_samples_kernel[(triton.cdiv(samples, BLOCK), batch)](
        f0,
        phase,
        span.begin,
        span.end,
        weight,
        bias,
        draws.seed,
        draws.stream,
        draws.counter,
        draws.noisy,
        out,
        frames,
        samples,
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


def causal_samples_reference(
    f0: Tensor,
    phase: Tensor,
    span: Span,
    weight: Tensor,
    bias: Tensor,
    voicing: Voicing,
    draws: Draws,
    out: Tensor,
) -> None:
    waves = phase.shape[2]
    for row, (begin, end) in enumerate(zip(span.begin.tolist(), span.end.tolist(), strict=True)):
        frames, samples = slice(begin, end), slice(begin * voicing.frame, end * voicing.frame)
        voiced = (f0[row, frames, None] > voicing.threshold).float()
        mixed = (voicing.amplitude * torch.sin(phase[row, frames]) * voiced).repeat_interleave(
            voicing.frame, dim=0
        )
        if draws.noisy[row]:
            level = voiced * voicing.noise_level + (1 - voiced) * voicing.amplitude / 3
            places = torch.arange(samples.start * waves, samples.stop * waves, device=f0.device)
            noise = random.uniform(draws.seed[row], draws.stream[row], draws.counter[row] + places)
            mixed = mixed + noise.view(-1, waves) * level.repeat_interleave(voicing.frame, dim=0)
        out[row, samples] = torch.tanh(mixed @ weight + bias)


@triton.jit
def _causal_phase_kernel(
    f0_ptr,
    begin_ptr,
    end_ptr,
    before_ptr,
    out_ptr,
    after_ptr,
    frames,
    sample_rate,
    samples_per_frame,
    WAVES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WAVES: tl.constexpr,
):
    item = tl.program_id(0)
    begin = tl.load(begin_ptr + item)
    end = tl.load(end_ptr + item)
    wave = tl.arange(0, BLOCK_WAVES)
    multiple = (wave + 1).to(tl.float32)
    rate = tl.zeros((BLOCK, BLOCK_WAVES), dtype=tl.float32) + sample_rate
    base = tl.load(before_ptr + item * WAVES + wave, mask=wave < WAVES, other=0.0)
    for start in range(begin, end, BLOCK):
        frame = start + tl.arange(0, BLOCK)
        pitch = tl.load(f0_ptr + item * frames + frame, mask=frame < end, other=0.0)
        turns = turns_of(pitch, multiple, rate)
        total = base[None, :] + tl.cumsum(turns, axis=0)
        tl.store(
            out_ptr + (item * frames + frame).to(tl.int64)[:, None] * WAVES + wave[None, :],
            total.to(tl.float32) * 6.283185307179586 * samples_per_frame,
            mask=(frame < end)[:, None] & (wave < WAVES)[None, :],
        )
        base += tl.sum(turns, axis=0)
    tl.store(after_ptr + item * WAVES + wave, base, mask=wave < WAVES)


@triton.jit
def _causal_samples_kernel(
    f0_ptr,
    phase_ptr,
    begin_ptr,
    end_ptr,
    weight_ptr,
    bias_ptr,
    seeds_ptr,
    streams_ptr,
    counters_ptr,
    noisy_ptr,
    out_ptr,
    frames,
    samples,
    amplitude,
    noise_voiced,
    noise_unvoiced,
    threshold,
    FRAME: tl.constexpr,
    WAVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(1)
    first = tl.load(begin_ptr + item) * FRAME
    last = tl.load(end_ptr + item) * FRAME
    if (tl.program_id(0) * BLOCK >= last) | ((tl.program_id(0) + 1) * BLOCK <= first):
        return
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (sample >= first) & (sample < last)
    frame = item.to(tl.int64) * frames + sample // FRAME

    voiced = tl.load(f0_ptr + frame, mask=inside, other=0.0) > threshold
    noise_level = tl.where(voiced, noise_voiced, noise_unvoiced)
    draws = tl.load(noisy_ptr + item) != 0
    seed = tl.load(seeds_ptr + item)
    stream = tl.load(streams_ptr + item)
    key0, key1 = keys_of(seed, stream)
    counter = tl.load(counters_ptr + item) + sample.to(tl.int64) * WAVES
    total = tl.zeros((BLOCK,), dtype=tl.float32) + tl.load(bias_ptr)
    for wave in range(WAVES):
        angle = tl.load(phase_ptr + frame * WAVES + wave, mask=inside, other=0.0)
        value = tl.where(voiced, amplitude * tl.sin(angle), 0.0)
        if draws:
            drawn = (bits(key0, key1, counter + wave) >> 9).to(tl.float32)
            value += (drawn + 0.5) * 1.1920928955078125e-07 * noise_level  # 2^-23
        total += value * tl.load(weight_ptr + wave)
    tl.store(out_ptr + item.to(tl.int64) * samples + sample, tanh(total), mask=inside)
