"""The small Fourier transforms at both ends of the vocoder's decoder, each computed as a sum over its few
terms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_MAGNITUDE = 100.0
FRAMES, HOPS = 64, 128  # of a program of the transform and of its inverse


@dataclass(frozen=True)
class Transform:
    """Hann windows of `size` samples, `hop` apart (a quarter of the size), centred; the signal has `frames`
    hops per mel frame. forward: (size, 2 * bins) and inverse: (2 * bins, size) float32 include the window;
    real parts come first. power: (size,) the squared window."""

    size: int
    hop: int
    frames: int
    forward: Tensor
    inverse: Tensor
    power: Tensor

    @classmethod
    def of(cls, size: int, hop: int, frames: int, device: torch.device) -> Transform:
        """Raises ValueError unless each sample is covered by four frames."""
        if size != 4 * hop:
            raise ValueError(f"a Fourier transform of {size} samples with a hop of {hop}: it must be 4 hops")
        window = torch.hann_window(size, dtype=torch.float64)
        bins = size // 2 + 1
        angle = 2 * math.pi * torch.outer(torch.arange(size), torch.arange(bins)).double() / size
        forward = torch.cat([torch.cos(angle), -torch.sin(angle)], dim=1) * window[:, None]
        # a real signal: every bin except the first and the last also represents its mirror image
        count = torch.full((bins, 1), 2.0, dtype=torch.float64)
        count[0] = count[-1] = 1.0
        inverse = torch.cat([torch.cos(angle).T * count, -torch.sin(angle).T * count]) / size * window
        tables = (table.float().contiguous().to(device) for table in (forward, inverse, window * window))
        return cls(size, hop, frames, *tables)


def stft(signal: Tensor, lengths: Tensor, transform: Transform, out: Tensor) -> None:
    """signal: (batch, samples) float32; lengths: (batch,) int32, mel frames; out: (batch, spectrum frames, 2
    * bins), written up to an item's end. Each item is reflected at both ends."""
    batch, capacity, width = out.shape
    _stft_kernel[(triton.cdiv(capacity, FRAMES), batch)](
        signal,
        signal.shape[1],
        lengths,
        transform.forward,
        out,
        capacity,
        transform.frames,
        SIZE=transform.size,
        HOP=transform.hop,
        WIDTH=width,
        BLOCK=FRAMES,
        BLOCK_WIDTH=triton.next_power_of_2(width),
        num_warps=4,
    )


def stft_reference(signal: Tensor, lengths: Tensor, transform: Transform, out: Tensor) -> None:
    for row, length in enumerate(lengths.tolist()):
        if length:
            own = signal[row, : length * transform.frames * transform.hop][None]
            own = torch.nn.functional.pad(own, 2 * (transform.size // 2,), mode="reflect")[0]
            out[row, : length * transform.frames + 1] = own.unfold(0, transform.size, transform.hop) @ (
                transform.forward
            )


def istft(x: Tensor, lengths: Tensor, transform: Transform, limit: float, out: Tensor) -> None:
    """x: (batch, spectrum frames, 2 * bins) float32: logarithms of magnitudes, and values whose sines are the
    phases; lengths: (batch,) int32, mel frames; out: (batch, samples) float32, clipped to +-limit, zero
    beyond an item's end."""
    batch, capacity, width = x.shape
    samples = out.shape[1]
    _istft_kernel[(triton.cdiv(samples // transform.hop, HOPS), batch)](
        x,
        capacity,
        lengths,
        transform.inverse,
        transform.power,
        out,
        samples,
        transform.frames,
        limit,
        BINS=width // 2,
        HOP=transform.hop,
        MAX_MAGNITUDE=MAX_MAGNITUDE,
        BLOCK=HOPS,
        num_warps=4,
    )


def istft_reference(x: Tensor, lengths: Tensor, transform: Transform, limit: float, out: Tensor) -> None:
    out.zero_()
    log_magnitude, phase = x.float().chunk(2, dim=2)
    magnitude, phase = torch.exp(log_magnitude).clamp(max=MAX_MAGNITUDE), torch.sin(phase)
    spectrum = torch.cat([magnitude * torch.cos(phase), magnitude * torch.sin(phase)], dim=2)
    half = transform.size // 2
    for row, length in enumerate(lengths.tolist()):
        if length:
            frames = length * transform.frames + 1
            pieces = spectrum[row, :frames] @ transform.inverse
            total = out.new_zeros((frames - 1) * transform.hop + transform.size)
            weight = torch.zeros_like(total)
            for frame in range(frames):
                at = slice(frame * transform.hop, frame * transform.hop + transform.size)
                total[at] += pieces[frame]
                weight[at] += transform.power
            wave = (total / weight.clamp(min=1e-11))[half:-half]
            out[row, : len(wave)] = wave.clamp(-limit, limit)


@triton.jit
def _stft_kernel(
    signal_ptr,
    samples,
    lengths_ptr,
    forward_ptr,
    out_ptr,
    capacity,
    frames_each,
    SIZE: tl.constexpr,
    HOP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    item = tl.program_id(1)
    length = tl.load(lengths_ptr + item)
    if length == 0:
        return
    frames = length * frames_each + 1
    if tl.program_id(0) * BLOCK >= frames:
        return
    frame = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_WIDTH)
    last = length * frames_each * HOP - 1
    own = signal_ptr + item.to(tl.int64) * samples
    total = tl.zeros((BLOCK, BLOCK_WIDTH), dtype=tl.float32)
    for n in tl.static_range(SIZE):
        at = tl.abs(frame * HOP + (n - SIZE // 2))
        at = tl.where(at > last, 2 * last - at, at)
        value = tl.load(own + at, mask=frame < frames, other=0.0)
        row = tl.load(forward_ptr + n * WIDTH + column, mask=column < WIDTH, other=0.0)
        total += value[:, None] * row[None, :]
    tl.store(
        out_ptr + (item.to(tl.int64) * capacity + frame)[:, None] * WIDTH + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(frame < frames)[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit
def _sin_cos_of_sin(x):
    """sin(sin(x)), cos(sin(x)): Taylor series up to |sin x| = 1, errors below 1e-7."""
    s = tl.sin(x)
    u = s * s
    sine = -2.505210838544172e-08 * u + 2.7557319223985893e-06
    sine = sine * u - 1.984126984126984e-04
    sine = sine * u + 8.333333333333333e-03
    sine = sine * u - 1.6666666666666666e-01
    cosine = 2.08767569878681e-09 * u - 2.755731922398589e-07
    cosine = cosine * u + 2.48015873015873e-05
    cosine = cosine * u - 1.3888888888888889e-03
    cosine = cosine * u + 4.1666666666666664e-02
    cosine = cosine * u - 0.5
    return s * (sine * u + 1.0), cosine * u + 1.0


@triton.jit
def _istft_kernel(
    x_ptr,
    capacity,
    lengths_ptr,
    inverse_ptr,
    power_ptr,
    out_ptr,
    samples,
    frames_each,
    limit,
    BINS: tl.constexpr,
    HOP: tl.constexpr,
    MAX_MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(1)
    length = tl.load(lengths_ptr + item)
    frames = tl.where(length > 0, length * frames_each + 1, 0)
    hop = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, HOP)
    total = tl.zeros((BLOCK, HOP), dtype=tl.float32)
    weight = tl.zeros((BLOCK, HOP), dtype=tl.float32)
    # the samples of a hop are covered by the four frames whose windows start at most one hop after its frame
    for back in range(4):
        frame = hop + 2 - back
        inside = (frame >= 0) & (frame < frames)
        own = x_ptr + (item.to(tl.int64) * capacity + frame) * (2 * BINS)
        n = back * HOP + place
        for bin in tl.static_range(BINS):
            magnitude = tl.exp(tl.load(own + bin, mask=inside, other=0.0))
            magnitude = tl.where(inside, tl.minimum(magnitude, MAX_MAGNITUDE), 0.0)
            sine, cosine = _sin_cos_of_sin(tl.load(own + BINS + bin, mask=inside, other=0.0))
            real = tl.load(inverse_ptr + bin * (4 * HOP) + n)
            imaginary = tl.load(inverse_ptr + (BINS + bin) * (4 * HOP) + n)
            total += (magnitude * cosine)[:, None] * real[None, :]
            total += (magnitude * sine)[:, None] * imaginary[None, :]
        weight += tl.where(inside[:, None], tl.load(power_ptr + n)[None, :], 0.0)
    wave = total / tl.maximum(weight, 1e-11)
    wave = tl.minimum(tl.maximum(wave, -limit), limit)
    wave = tl.where((hop < frames - 1)[:, None], wave, 0.0)
    sample = hop[:, None] * HOP + place[None, :]
    tl.store(out_ptr + item.to(tl.int64) * samples + sample, wave, mask=sample < samples)
