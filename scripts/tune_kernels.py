#!/usr/bin/env python3
"""Measures launch configurations of the language model's decode kernels on this machine's GPU and writes the
fastest to light_tts/kernels/configs/, where the kernels look for them. Takes about a minute:

    python scripts/tune_kernels.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from light_tts.kernels import configs, overlap
from light_tts.kernels.decode_attention import DecodeConfig, decode_attention, decode_config
from light_tts.kernels.rotary import rotary_kv_write
from light_tts.kernels.small_linear import (
    LinearConfig,
    linear_add_,
    linear_config,
    norm_gate_up_silu,
    norm_linear,
)

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, SPEECH_IDS = 896, 4864, 14, 2, 64, 6564  # CosyVoice2-0.5B
LAYERS = 24
LINEARS = [  # kernel, outputs, inputs
    ("norm_gate_up_silu", 2 * INTERMEDIATE, HIDDEN),
    ("linear_add_", HIDDEN, INTERMEDIATE),
    ("norm_linear", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    ("linear_add_", HIDDEN, HEADS * HEAD_DIM),
    ("norm_linear", SPEECH_IDS, HIDDEN),
]
LINEAR_ROWS = (1, 16)
MAX_LENGTHS = (512, 1024, 2048, 4096)
BATCHES = (1, 8, 64)

Config = DecodeConfig | LinearConfig


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Of one call, where all follow one another in a CUDA graph as they do in a decode step."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return triton.testing.do_bench(graph.replay, warmup=2, rep=10) * 1000 / len(calls)


def fastest(
    name: str,
    candidates: Iterable[Config],
    workloads: dict[int, Callable[[Config], list[Callable[[], object]]]],
    deadline: float,
) -> Config:
    """The candidate with the least geometric mean of its times over all workloads, among those tried until
    the deadline (the first one always is)."""
    best, best_score, best_times = None, math.inf, {}
    for config in candidates:
        if best is not None and time.monotonic() > deadline:
            print(f"{name}: out of time, the rest was not tried")
            break
        try:
            times = {size: microseconds(calls(config)) for size, calls in workloads.items()}
        except triton.runtime.errors.OutOfResources:
            continue
        score = sum(math.log(t) for t in times.values())
        if score < best_score:
            best, best_score, best_times = config, score, times
    print(f"{name}: " + ", ".join(f"{size}: {t:.1f} us" for size, t in best_times.items()), best, flush=True)
    return best


def linear_candidates(kernel: str, inputs: int) -> list[LinearConfig]:
    splits = [1] if kernel != "linear_add_" else [2, 4, 8] if inputs > 2048 else [1, 2, 4]
    shapes = [
        (16, 128, 4, 4),
        (16, 128, 4, 8),
        (16, 256, 4, 4),
        (16, 64, 4, 8),
        (32, 128, 4, 4),
        (16, 128, 2, 6),
    ]
    return [
        LinearConfig(o, k, s, warps, stages) for (o, k, warps, stages), s in itertools.product(shapes, splits)
    ]


def tune_linear(kernel: str, outputs: int, inputs: int, deadline: float) -> dict[str, int]:
    weights = [randn(outputs, inputs) for _ in range(LAYERS)]  # together more than the L2 cache
    gain, bias = randn(inputs), randn(outputs)

    def workload(rows: int) -> Callable[[LinearConfig], list[Callable[[], object]]]:
        x, residual = randn(rows, inputs), randn(rows, outputs)

        def call(weight: Tensor, config: LinearConfig) -> object:
            if kernel == "linear_add_":
                return linear_add_(residual, x, weight, config)
            if kernel == "norm_linear":
                return norm_linear(x, gain, 1e-6, weight, bias, config)
            return norm_gate_up_silu(x, gain, 1e-6, weight, config)

        return lambda config: [lambda weight=weight: call(weight, config) for weight in weights]

    name = f"{kernel} {outputs} x {inputs}, rows"
    workloads = {rows: workload(rows) for rows in LINEAR_ROWS}
    best = fastest(name, linear_candidates(kernel, inputs), workloads, deadline)
    return {"outputs": outputs, "inputs": inputs, **asdict(best)}


def tune_decode(max_length: int, deadline: float) -> dict[str, int]:
    rows = max(BATCHES)
    slots = rows * max_length
    k, v = randn(slots, KV_HEADS, HEAD_DIM), randn(slots, KV_HEADS, HEAD_DIM)
    table = torch.randperm(slots, device="cuda").int().view(rows, max_length)

    def workload(batch: int) -> Callable[[DecodeConfig], list[Callable[[], object]]]:
        q = randn(batch, HEADS, HEAD_DIM)
        row = torch.arange(batch, device="cuda", dtype=torch.int32)
        lengths = torch.full_like(row, max_length * 3 // 4)
        return lambda config: (
            [lambda: decode_attention(q, k, v, None, None, table, row, lengths, max_length, config)] * LAYERS
        )

    candidates = [
        DecodeConfig(block, split, 4, stages)
        for block, split, stages in [
            (64, 128, 2),
            (64, 64, 1),
            (64, 256, 2),
            (128, 128, 1),
            (128, 256, 2),
            (64, 256, 3),
            (32, 128, 3),
            (128, 512, 2),
        ]
        if split <= max_length
    ]
    workloads = {batch: workload(batch) for batch in BATCHES}
    best = fastest(f"decode_attention up to {max_length}, batches", candidates, workloads, deadline)
    return {"max_length": max_length, **asdict(best)}


def all_layers(batch: int, length: int = 512) -> Callable[[], float]:
    """-> what measures all layers of a decode step, in microseconds"""
    qkv_size = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    shapes = [
        (qkv_size, HIDDEN),
        (HIDDEN, HEADS * HEAD_DIM),
        (2 * INTERMEDIATE, HIDDEN),
        (HIDDEN, INTERMEDIATE),
    ]
    layers = [[randn(*shape) / 100 for shape in shapes] for _ in range(LAYERS)]
    x, gain, bias = randn(batch, HIDDEN), randn(HIDDEN), randn(qkv_size)
    k, v = randn(batch * length, KV_HEADS, HEAD_DIM), randn(batch * length, KV_HEADS, HEAD_DIM)
    table = torch.arange(batch * length, device="cuda", dtype=torch.int32).view(batch, length)
    rows = torch.arange(batch, device="cuda", dtype=torch.int32)
    lengths = torch.full_like(rows, length)
    cos = torch.ones(length, HEAD_DIM // 2, device="cuda")

    def layer(qkv: Tensor, out: Tensor, gate_up: Tensor, down: Tensor) -> None:
        q = norm_linear(x, gain, 1e-6, qkv, bias)
        q = rotary_kv_write(q, cos, cos, rows, rows, k, v, None, None)
        attended = decode_attention(q, k, v, None, None, table, rows, lengths, length)
        linear_add_(x, attended.flatten(1), out)
        linear_add_(x, norm_gate_up_silu(x, gain, 1e-6, gate_up), down)

    calls = [lambda weights=weights: layer(*weights) for weights in layers]
    return lambda: microseconds(calls) * LAYERS


def tune_overlap() -> bool:
    measure = all_layers(batch=1)
    times = {}
    for value in (False, True):
        overlap.enabled = lambda device, value=value: value
        times[value] = measure()
    best = min(times, key=times.get)
    overlap.enabled = lambda device: best
    print(f"all layers, batch 1: {times[False]:.0f} us one after the other, {times[True]:.0f} us overlapping")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="stop trying candidates after this time")
    parser.add_argument("--output", type=Path, help="the file to write; default: where the kernels look")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU")
    output = arguments.output or configs.path_of(torch.device("cuda"))

    found: dict[str, bool | list[dict[str, int]]] = {}
    begin = time.monotonic()
    if torch.cuda.get_device_capability() >= (9, 0):
        found["overlap"] = tune_overlap()
    tasks = [
        (linear[0], lambda deadline, linear=linear: tune_linear(*linear, deadline)) for linear in LINEARS
    ]
    tasks += [("decode_attention", lambda deadline, n=n: tune_decode(n, deadline)) for n in MAX_LENGTHS]
    for i, (kernel, tune) in enumerate(tasks):
        now = time.monotonic()  # each gets its share of what is left
        share = (begin + arguments.seconds - now) / (len(tasks) - i)
        found.setdefault(kernel, []).append(tune(now + share))
    known = json.loads(output.read_text()) if output.exists() else {}
    output.write_text(json.dumps({**known, **found}, indent=2) + "\n")

    configs.load = lambda device: found
    for cached in (decode_config, linear_config):
        cached.cache_clear()
    for batch in (1, 16, 32):
        print(f"all layers, batch {batch}: {all_layers(batch)():.0f} us")
    print(f"{output} written in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
