"""Compiles for an H100 the kernels of the flow's diffusion transformer in the sizes of CosyVoice3, with the
configurations measured on one GPU, given by the path of their file; prints as JSON how often each kernel was
compiled. As full_size_warm_ups.py, a part of test_compile_ahead.py."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from light_tts.kernels import configs, overlap
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.flow.euler_step import flow_step
from light_tts.kernels.flow.grouped_conv import grouped_conv
from light_tts.kernels.flow.modulated_norm import modulated_norm
from light_tts.kernels.flow.packed_attention import BLOCK_ENTRIES, CachedKeys, packed_attention
from light_tts.kernels.flow.packed_conv import CachedEdges
from light_tts.kernels.flow.packed_linear import Gate, Rotary, packed_linear, packed_linear_add_
from support.fake_gpu import FakeGpu

WIDTH, FEED, HEADS, MELS = 1024, 2048, 16, 80
TAPS, GROUPS = 31, 16
PAGES, STEPS, COPIES, FRAMES = 2, 10, 2, 50
ROWS = (128, 224, 512, 8192)


def launch_all(rows: int, dtype: torch.dtype) -> None:
    """Launch each kernel as the estimator does, on arbitrary numbers."""

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, normal, position = torch.empty(rows, WIDTH), matrix(rows, WIDTH), torch.empty(rows, dtype=torch.int32)
    step, modulation = position[:1], torch.empty(STEPS, 6, WIDTH)
    qkv, feed, inputs = matrix(rows, 3 * WIDTH), matrix(rows, FEED), matrix(rows, 4 * MELS)
    rotation = Rotary(position[: rows // COPIES], torch.empty(100, 64), (0, WIDTH), 64)
    gate = Gate(modulation[:, 2], step)
    packed_linear(inputs, matrix(4 * MELS, WIDTH), x[0], position, x)
    taps = matrix(TAPS, GROUPS, WIDTH // GROUPS, WIDTH // GROUPS)
    edges = CachedEdges(matrix(PAGES, STEPS, COPIES, TAPS - 1, WIDTH), position, position, step)
    for cached in (None, edges):
        grouped_conv(x, taps, x[0], position, normal, cached=cached)
        grouped_conv(normal, taps, x[0], position, x, x, cached)
    modulated_norm(x, modulation[:, :2], step, position, normal, 1e-6)
    packed_linear(normal, matrix(WIDTH, 3 * WIDTH), qkv[0].float(), position, qkv, rotation=rotation)
    keys = CachedKeys(matrix(PAGES, STEPS, COPIES, FRAMES, 2 * WIDTH), position, step)
    blocks = torch.empty(8, BLOCK_ENTRIES, dtype=torch.int32)
    block_rows = 32 if rows <= 1024 else 64
    packed_attention(qkv, blocks, normal, HEADS, block_rows, COPIES, keys)
    packed_linear_add_(x, normal, matrix(WIDTH, WIDTH), x[0], position, gate=gate)
    packed_linear(normal, matrix(WIDTH, FEED), feed[0].float(), position, feed, "gelu_tanh")
    packed_linear_add_(x, feed, matrix(FEED, WIDTH), x[0], position, gate=gate)
    state = torch.empty(rows // COPIES, MELS)
    flow_step(normal, matrix(WIDTH, MELS), state[0], 0.7, x[0, :STEPS], step, position, state, inputs)


def main() -> None:
    gpu, measured = FakeGpu(), json.loads(Path(sys.argv[1]).read_text())
    configs.load = lambda device: measured

    def rehearse() -> None:
        for rows, dtype in itertools.product(ROWS, (torch.float16, torch.float32)):
            for overlapping in (False, True) if rows <= 1024 and dtype == torch.float16 else (False,):
                overlap.enabled = lambda *_, overlapping=overlapping: overlapping
                launch_all(rows, dtype)

    compile_ahead(torch.device("cuda", 0), rehearse)
    print(json.dumps(Counter(gpu.compiled)))


if __name__ == "__main__":
    main()
