"""Chooses the tile that a program of the vocoder's convolutions computes, see conv.py."""

from __future__ import annotations

import torch
import triton

from light_tts.kernels import configs
from light_tts.kernels.launch import Config, measured_up_to
from light_tts.kernels.vocoder.layout import PARTS, Convolutions, Sums

MULTIPROCESSORS = 132  # of an H100 or H200
BUSY = 96  # programs of a launch that has enough of them


def convolve_config(conv: Convolutions, rows: int, sums: Sums) -> Config:
    """Return the tile measured for so many frames on this GPU, else one that keeps it busy. In which order
    products are added does not depend on it."""
    entries = configs.load(conv.weight.device).get(conv.name, [])
    return measured_up_to(entries, rows=rows) or usual_config(conv, rows, sums)


def tile(frames: int, outputs: int, warps: int, stages: int) -> Config:
    return {"BLOCK_FRAMES": frames, "BLOCK_OUT": outputs, "num_warps": warps, "num_stages": stages}


def tile_in_parts(frames: int, outputs: int, stages: int) -> Config:
    """Return a tile for sums in parts; two programs of a small one fit on a multiprocessor at once."""
    return tile(frames, outputs, PARTS, stages) | ({"maxnreg": 128} if frames * outputs <= 32 * 32 else {})


def usual_config(conv: Convolutions, rows: int, sums: Sums) -> Config:
    """Return the tile where none was measured: large ones if there are many frames."""
    channels = max(16, triton.next_power_of_2(conv.channels_out))

    def programs(frames: int, outputs: int) -> int:
        return triton.cdiv(rows, frames) * triton.cdiv(conv.channels_out, outputs) * conv.branches

    if conv.parts == PARTS:
        frames, outputs = (32, 64) if channels >= 64 else (64, channels)
        while frames * outputs > 16 * 16 and programs(frames, outputs) < BUSY:
            frames, outputs = (frames, outputs // 2) if outputs > frames else (frames // 2, outputs)
        return tile_in_parts(frames, outputs, stages=4)
    if conv.weight.dtype == torch.float16:
        if programs(128, 128) >= 2 * MULTIPROCESSORS:
            # narrower if a residual uses registers, so that two programs fit on a multiprocessor at once
            return tile(128, min(channels, 128 if sums.residual is None else 64), warps=8, stages=3)
        if programs(64, 64) < 2 * MULTIPROCESSORS:  # each has room for more tiles in flight
            narrow = programs(64, 64) < BUSY // 2
            return tile(64, min(channels, 32 if narrow else 64), warps=4, stages=5)
    return tile(64, min(channels, 64), warps=4, stages=3)
