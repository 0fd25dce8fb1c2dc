#!/usr/bin/env python3
"""Measures launch configurations of the flow's kernels on this machine's GPU, by number of rows, and writes
the fastest to light_tts/kernels/configs/, where the kernels find them. Takes about two minutes:

    python scripts/tune_flow.py [--part estimator|encoder|transformer]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from light_tts.kernels import configs, overlap
from light_tts.kernels.flow import (
    grouped_conv,
    layer_norm_linear,
    modulated_norm,
    packed_attention,
    packed_conv,
    packed_linear,
    relative_attention,
    row_tiles,
    shifted_linear,
)
from light_tts.kernels.launch import Config

ROWS = (512, 1024, 2048, 4096, 8192, 16384)
WIDTH, HEADS, INNER, FEED = 256, 8, 512, 1024  # CosyVoice2-0.5B
MODULES: tuple[Any, ...] = (
    grouped_conv, layer_norm_linear, modulated_norm, packed_attention, packed_conv, packed_linear,
    relative_attention, shifted_linear,
)  # fmt: skip
LENGTH = 420  # frames per sequence, for attention
ENCODER_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192)
ENCODER_WIDTH, ENCODER_FEED, ENCODER_LENGTH, MELS = 512, 2048, 256, 80
TRANSFORMER_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DIT_WIDTH, DIT_FEED, DIT_HEAD = 1024, 2048, 64  # Fun-CosyVoice3-0.5B
DIT_STEPS, TAPS, GROUPS = 10, 31, 16
# Calls of the transformer have so many different weights, more than the L2 cache holds, as in a step.
COLD = 60
Product = tuple[str, int, int]  # kernel, in, out
ESTIMATOR: list[Product] = [
    ("layer_norm_linear", WIDTH, 3 * INNER),
    ("layer_norm_linear", WIDTH, FEED),
    ("packed_linear", WIDTH, 3 * INNER),
    ("packed_linear", WIDTH, FEED),
    ("packed_linear_add", INNER, WIDTH),
    ("packed_linear_add", FEED, WIDTH),
    ("packed_linear_add_norm", INNER, WIDTH),
    ("packed_linear_add_norm", FEED, WIDTH),
    ("packed_conv", 320, WIDTH),
    ("packed_conv", WIDTH, WIDTH),
    ("packed_conv", 2 * WIDTH, WIDTH),
    ("packed_attention_32", INNER, INNER),
    ("packed_attention_64", INNER, INNER),
    ("packed_attention_128", INNER, INNER),
]
ENCODER: list[Product] = [
    ("layer_norm_linear", ENCODER_WIDTH, 3 * ENCODER_WIDTH),
    ("layer_norm_linear", ENCODER_WIDTH, ENCODER_FEED),
    ("layer_norm_linear", ENCODER_WIDTH, MELS),
    ("packed_linear", ENCODER_WIDTH, 3 * ENCODER_WIDTH),
    ("packed_linear", ENCODER_WIDTH, ENCODER_FEED),
    ("packed_linear_add", ENCODER_WIDTH, ENCODER_WIDTH),
    ("packed_linear_add", ENCODER_FEED, ENCODER_WIDTH),
    ("shifted_linear_4", ENCODER_WIDTH, ENCODER_WIDTH),
    ("shifted_linear_3", ENCODER_WIDTH, ENCODER_WIDTH),
    ("shifted_linear_3", ENCODER_WIDTH, 2 * ENCODER_WIDTH),
    ("relative_attention", ENCODER_WIDTH, ENCODER_WIDTH),
]
TRANSFORMER: list[Product] = [
    ("packed_linear", 4 * MELS, DIT_WIDTH),
    ("grouped_conv", DIT_WIDTH, DIT_WIDTH),
    ("modulated_norm", DIT_WIDTH, DIT_WIDTH),
    ("packed_linear", DIT_WIDTH, 3 * DIT_WIDTH),
    ("packed_linear_add", DIT_WIDTH, DIT_WIDTH),
    ("packed_linear", DIT_WIDTH, DIT_FEED),
    ("packed_linear_add", DIT_FEED, DIT_WIDTH),
]


def candidates(kernel: str) -> Iterator[Config]:
    def shapes(names: str, *choices: tuple[int, ...]) -> Iterator[Config]:
        for values in choices:
            yield dict(zip(names.split(), values, strict=True))

    if kernel == "layer_norm_linear":
        yield from shapes(
            "BLOCK_ROWS BLOCK_OUT TILES num_warps num_stages",
            *itertools.product((16, 32, 64), (64, 128), (1, 4), (4,), (2,)),
            *itertools.product((64, 128), (128,), (1, 2, 8), (8,), (2,)),
            *itertools.product((16, 32), (32, 64, 128), (1,), (8,), (2,)),  # for wide rows
        )
    elif kernel == "packed_linear":
        yield from shapes(
            "BLOCK_ROWS BLOCK_OUT BLOCK_IN num_warps num_stages",
            *itertools.product((64, 128), (128,), (64,), (4, 8), (3, 4)),
            *itertools.product((64, 128), (256,), (64,), (8,), (3, 4)),
            (128, 128, 128, 8, 2),
            (64, 64, 64, 4, 4),
            *itertools.product((32, 64), (32, 64), (128,), (4,), (3, 4)),  # for few, wide rows
        )
    elif kernel == "packed_linear_add" or kernel.startswith("shifted_linear"):
        yield from shapes(
            "BLOCK_ROWS BLOCK_OUT BLOCK_IN num_warps num_stages",
            *itertools.product((16, 32, 64), (32, 64), (128,), (4,), (3, 4)),
            *itertools.product((64, 128), (64, 128), (64,), (4,), (3, 4)),
            *itertools.product((128,), (128,), (64,), (8,), (3, 4)),
        )
    elif kernel == "packed_linear_add_norm":
        yield from shapes(
            "BLOCK_ROWS BLOCK_IN num_warps num_stages",
            *itertools.product((16, 32), (64, 128), (4, 8), (3,)),
            *itertools.product((64, 128), (64,), (8,), (3, 4)),
            (64, 64, 4, 3),
        )
    elif kernel == "packed_conv":
        yield from shapes(
            "BLOCK_ROWS BLOCK_IN num_warps num_stages",
            *itertools.product((16, 32), (64, 128), (4, 8), (3,)),
            *itertools.product((64,), (32, 64), (8,), (3, 4)),
            (128, 64, 8, 3),
        )
    elif kernel == "grouped_conv":
        yield from shapes(
            "BLOCK_ROWS num_warps num_stages",
            *itertools.product((16, 32, 64), (4,), (3, 4, 6)),
            *itertools.product((128,), (4, 8), (3, 4)),
        )
    elif kernel == "modulated_norm":
        yield from shapes("BLOCK_ROWS num_warps", *itertools.product((1, 2, 4), (1, 2, 4, 8)))
    elif kernel == "relative_attention":
        yield from shapes(
            "BLOCK_ROWS BLOCK_KEYS num_warps num_stages",
            *itertools.product((16, 32, 64), (32, 64), (4, 8), (1, 2, 3)),
        )
    else:
        yield from shapes("BLOCK_KEYS num_warps num_stages", *itertools.product((64, 128), (4, 8), (2, 3)))


def call_of(kernel: str, width: int, out_width: int, rows: int) -> Callable[[], object]:
    """Return a call of the kernel on random rows; its launch configuration comes from `measured_for_rows` of
    its module."""

    def draw(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return (torch.randn(shape, device="cuda") * shape[0] ** -0.5).to(dtype)

    position = (torch.arange(rows, device="cuda") % LENGTH).int()
    x = torch.randn(rows, width, device="cuda").half()
    out, weight, bias = draw(rows, out_width), draw(width, out_width), draw(out_width, dtype=torch.float32)
    activations: dict[tuple[int, int], row_tiles.Activation] = {
        (WIDTH, FEED): "gelu",
        (ENCODER_WIDTH, ENCODER_FEED): "silu",
        (DIT_WIDTH, DIT_FEED): "gelu_tanh",
    }
    activation = activations.get((width, out_width))
    wide = width >= DIT_WIDTH and out_width >= DIT_WIDTH  # of the transformer
    weights = itertools.cycle([weight.clone() for _ in range(COLD)] if wide else [weight])
    stream, step = out.float(), position[:1]  # position is 0 there
    modulation = draw(DIT_STEPS, 6, out_width, dtype=torch.float32)
    if kernel == "layer_norm_linear":
        return lambda: layer_norm_linear.layer_norm_linear(x, weight, bias, position, out, 1e-5, activation)
    if kernel == "modulated_norm":
        part = modulation[:, :2]
        return lambda: modulated_norm.modulated_norm(stream, part, step, position, out, 1e-6)
    if kernel == "grouped_conv":
        shape = TAPS, GROUPS, width // GROUPS, out_width // GROUPS
        groups = itertools.cycle([draw(*shape) for _ in range(COLD)])
        return lambda: grouped_conv.grouped_conv(x, next(groups), bias, position, stream, stream)
    if kernel == "packed_linear" and out_width == 3 * DIT_WIDTH:
        table = packed_linear.rotary_table(torch.ones(DIT_HEAD // 2, device="cuda"), LENGTH)
        rotation = packed_linear.Rotary(position, table, (0, DIT_WIDTH), DIT_HEAD)
        return lambda: packed_linear.packed_linear(x, next(weights), bias, position, out, rotation=rotation)
    if kernel == "packed_linear_add" and wide:
        gate = packed_linear.Gate(modulation[:, 2], step)
        return lambda: packed_linear.packed_linear_add_(stream, x, next(weights), bias, position, gate=gate)
    if kernel == "packed_linear":
        return lambda: packed_linear.packed_linear(x, next(weights), bias, position, out, activation)
    if kernel.startswith("packed_linear_add"):
        normal = torch.empty_like(out) if kernel.endswith("norm") else None
        return lambda: packed_linear.packed_linear_add_(out, x, weight, bias, position, normal, 1e-5)
    if kernel == "packed_conv":
        taps = torch.stack([weight] * 3)
        norm = packed_conv.Norm(bias, bias, 1e-5)
        return lambda: packed_conv.packed_conv(x, taps, bias, position, out, norm)
    if kernel.startswith("shifted_linear"):
        taps = torch.stack([weight] * int(kernel.rsplit("_", 1)[1]))
        return lambda: shifted_linear.shifted_linear(x, taps, bias, position, out, LENGTH, 0)
    if kernel == "relative_attention":
        length = min(rows, ENCODER_LENGTH)
        items = torch.tensor([[length, 0]] * (rows // length), dtype=torch.int32, device="cuda")
        positions, biases = draw(2 * length - 1, width), draw(2, width, dtype=torch.float32)
        qkv = torch.randn(rows, 3 * width, device="cuda").half()
        return lambda: relative_attention.relative_attention(qkv, positions, biases, items, out, HEADS)
    block_rows = int(kernel.rsplit("_", 1)[1])
    lengths = [min(LENGTH, rows // 2 - start) for start in range(0, rows // 2, LENGTH)]
    count = rows // 2 // block_rows + len(lengths) + 8
    table = packed_attention.attention_blocks(lengths, [0] * len(lengths), block_rows, count)
    blocks, qkv = torch.from_numpy(table).cuda(), torch.randn(rows, 3 * width, device="cuda").half()
    return lambda: packed_attention.packed_attention(qkv, blocks, out, HEADS, block_rows, 2)


def use(shape: Config) -> None:
    """Set the launch configuration; kernels run one by one, without overlap."""
    overlap.enabled = lambda *_: False
    for module in MODULES:
        module.measured_for_rows = lambda *_: dict(shape)


def microseconds(call: Callable[[], object], repeat: int = 20) -> float:
    """Return the time of one call, measured back to back in a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / repeat)
    return sorted(times)[2]


def compile_some(share: list[tuple[Product, Config]]) -> None:
    """Compile kernels into Triton's on-disk cache."""
    for product, shape in share:
        use(shape)
        try:
            call_of(*product, 64)()
        except Exception as error:  # too large for this GPU: raised again and skipped when measured
            print(f"{product} {shape}: {type(error).__name__}", flush=True)


def main() -> None:
    parts = {
        "estimator": (ESTIMATOR, ROWS),
        "encoder": (ENCODER, ENCODER_ROWS),
        "transformer": (TRANSFORMER, TRANSFORMER_ROWS),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="instead of the file of this GPU")
    parser.add_argument("--part", choices=tuple(parts), help="of the flow; default: all")
    args = parser.parse_args()
    products = [
        (product, rows)
        for part, (members, rows) in parts.items()
        if args.part in (None, part)
        for product in members
    ]
    jobs = [(product, shape) for product, _ in products for shape in candidates(product[0])]
    workers = min(12, os.cpu_count() or 1)
    print(f"compiling {len(jobs)} variants in {workers} processes", flush=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_some, [jobs[index :: 4 * workers] for index in range(4 * workers)], chunksize=1)
    found: dict[str, list[Config]] = {}
    for product, sizes in products:
        kernel, width, out_width = product
        separator = "x" if kernel.startswith("shifted_linear") else "_"
        name = kernel if "attention" in kernel else f"{kernel}{separator}{width}x{out_width}"
        if kernel == "modulated_norm":
            name = f"{kernel}_{width}"
        elif kernel == "grouped_conv":
            name = f"{kernel}_{GROUPS}x{width // GROUPS}x{out_width // GROUPS}"
        repeat = COLD if product in TRANSFORMER else 20
        for rows in sizes:
            measured = []
            for shape in candidates(kernel):
                use(shape)
                try:
                    measured.append((microseconds(call_of(*product, rows), repeat), shape))
                except Exception:
                    continue
            time, best = min(measured, key=lambda pair: pair[0])
            found.setdefault(name, []).append({"rows": rows, **best})
            print(f"{name:28} {rows:6} rows {time:8.1f} us  {best}", flush=True)
    configs.save(torch.device("cuda"), found, args.output)


if __name__ == "__main__":
    main()
