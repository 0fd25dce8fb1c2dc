#!/usr/bin/env python3
"""Measures launch configurations of the language model's decode kernels on this machine's GPU and writes the
fastest to light_tts/kernels/configs/, where the kernels look for them. Takes about two minutes:

    python scripts/tune_kernels.py

Several processes compile the candidates first. All times are printed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from light_tts.kernels import configs, overlap
from light_tts.kernels.activation import silu_mul
from light_tts.kernels.decode_attention import DecodeConfig, decode_attention, decode_config
from light_tts.kernels.norm import add_rms_norm_
from light_tts.kernels.row_linear import RowConfig, row_config, row_linear
from light_tts.kernels.small_linear import (
    LinearConfig,
    linear_add_,
    linear_config,
    norm_gate_up_silu,
    norm_linear,
)

DEVICE = "cuda"
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, SPEECH_IDS = 896, 4864, 14, 2, 64, 6564  # CosyVoice2-0.5B
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
EPS = 1e-6
LAYERS = 24  # together their weights are more than the L2 cache
LINEARS = [  # kernel, outputs, inputs
    ("norm_gate_up_silu", 2 * INTERMEDIATE, HIDDEN),
    ("linear_add_", HIDDEN, INTERMEDIATE),
    ("norm_linear", QKV, HIDDEN),
    ("linear_add_", HIDDEN, HEADS * HEAD_DIM),
    ("norm_linear", SPEECH_IDS, HIDDEN),
]
ROW_TILES = {  # by the inputs rounded up: block_out, warps
    1024: [(8, 4), (4, 4), (16, 4), (2, 4), (8, 8)],
    8192: [(2, 8), (4, 8), (1, 8), (2, 4), (1, 4)],
}
TILES = {  # by rows: block_out, block_k, warps, stages
    16: [(32, 128, 4, 4), (16, 128, 4, 4), (16, 128, 4, 8), (32, 128, 4, 7)],
    32: [(32, 128, 4, 4), (16, 128, 4, 5), (32, 64, 4, 6)],
    64: [(32, 64, 4, 4), (32, 64, 4, 6), (32, 128, 4, 3), (64, 64, 4, 5)],
}
DECODE = [  # block, split, warps
    (64, 64, 4),
    (64, 128, 4),
    (64, 256, 4),
    (64, 512, 4),
    (64, 1024, 4),
    (128, 128, 4),
    (32, 64, 4),
    (128, 256, 8),
    (128, 512, 8),
    (256, 256, 8),
    (512, 512, 16),
]
MAX_LENGTHS = (512, 1024, 2048, 4096)
BATCHES = (1, 8, 32, 64)

Config = DecodeConfig | LinearConfig | RowConfig
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Task:
    """An entry to be found: of `kernel`, for `size`. `prepare`: layers -> what makes the calls, one a
    layer, with a configuration; None: with the general kernels of PyTorch, if there is a choice."""

    kernel: str
    size: dict[str, int]
    candidates: list[Config]
    prepare: Callable[[int], Callable[[Config | None], Calls | None]]

    @property
    def name(self) -> str:
        return f"{self.kernel} " + " ".join(f"{name}={n}" for name, n in self.size.items())


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float16)


def microseconds(calls: Calls) -> float:
    """Of one call, where all follow one another in a CUDA graph as they do in a decode step."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return triton.testing.do_bench(graph.replay, warmup=2, rep=10) * 1000 / len(calls)


def all_tasks() -> list[Task]:
    """The most important first."""
    tasks = [row_task(*linear) for linear in LINEARS]
    tasks += [decode_task(batch, n) for n in MAX_LENGTHS for batch in BATCHES]
    return tasks + [linear_task(*linear, rows) for rows in (64, 16, 32) for linear in LINEARS]


def row_task(kernel: str, outputs: int, inputs: int) -> Task:
    def prepare(layers: int) -> Callable[[RowConfig | None], Calls | None]:
        gated, add = kernel == "norm_gate_up_silu", kernel == "linear_add_"
        weights = [randn(outputs, inputs) for _ in range(layers)]
        bias = randn(outputs) if kernel == "norm_linear" else None
        x, out = randn(1, inputs), randn(1, outputs // 2 if gated else outputs)
        eps = None if add else EPS

        def calls(config: RowConfig | None) -> Calls | None:
            return config and [
                lambda w=w: row_linear(x, w, out, bias, eps, gated, add, config) for w in weights
            ]

        return calls

    candidates = [RowConfig(*tile) for tile in ROW_TILES[triton.next_power_of_2(inputs)]]
    return Task("row_linear", {"outputs": outputs, "inputs": inputs}, candidates, prepare)


def linear_task(kernel: str, outputs: int, inputs: int, rows: int) -> Task:
    def prepare(layers: int) -> Callable[[LinearConfig | None], Calls]:
        weights = [randn(outputs, inputs) for _ in range(layers)]
        x, y, residual, bias = randn(rows, HIDDEN), randn(rows, inputs), randn(rows, outputs), randn(outputs)

        def fused(weight: Tensor, config: LinearConfig) -> object:
            if kernel == "linear_add_":
                return linear_add_(residual, y, weight, config)
            if kernel == "norm_linear":
                return norm_linear(x, EPS, weight, bias, config)
            return norm_gate_up_silu(x, EPS, weight, config)

        def general(weight: Tensor) -> object:
            """What the many kernels do in all, the norm counted with the linear in front of it."""
            if kernel == "linear_add_":
                return add_rms_norm_(residual, F.linear(y, weight), EPS)
            if kernel == "norm_linear":
                return F.linear(x, weight, bias)
            return silu_mul(F.linear(x, weight))

        def calls(config: LinearConfig | None) -> Calls:
            return [lambda w=w: fused(w, config) if config else general(w) for w in weights]

        return calls

    splits = [1] if kernel != "linear_add_" else [4, 8] if inputs > 2048 else [1, 4]
    tiles = itertools.product(TILES[rows], splits)
    candidates = [LinearConfig(o, k, s, warps, stages) for (o, k, warps, stages), s in tiles]
    return Task(kernel, {"outputs": outputs, "inputs": inputs, "rows": rows}, candidates, prepare)


def decode_task(batch: int, max_length: int) -> Task:
    def prepare(layers: int) -> Callable[[DecodeConfig | None], Calls | None]:
        slots = batch * max_length
        pools = [(*randn(2, slots, KV_HEADS, HEAD_DIM), None, None) for _ in range(layers)]
        table = torch.randperm(slots, device=DEVICE).int().view(batch, max_length)
        rows = torch.arange(batch, device=DEVICE, dtype=torch.int32)
        lengths = torch.full_like(rows, max_length * 3 // 4)
        qkv, rope = randn(batch, QKV), torch.ones(2, max_length, HEAD_DIM // 2, device=DEVICE)
        where = (table, rows, lengths, max_length)

        def calls(config: DecodeConfig | None) -> Calls | None:
            return config and [lambda p=p: decode_attention(qkv, *rope, *p, *where, config) for p in pools]

        return calls

    candidates = [DecodeConfig(*tile) for tile in DECODE if tile[1] <= max_length]
    size = {"groups": batch * KV_HEADS, "max_length": max_length}
    return Task("decode_attention", size, candidates, prepare)


def compile_share(share: int, shares: int) -> None:
    """Runs its share of all candidates once, for Triton's cache."""
    different = {}
    for task in all_tasks():
        # the code of attention is the same for any batch and length
        shape = () if task.kernel == "decode_attention" else tuple(task.size.values())
        different.update({(task.kernel, shape, config): task for config in task.candidates})
    for (_, _, config), task in list(different.items())[share::shares]:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            task.prepare(1)(config)[0]()


def compile_all(processes: int) -> None:
    command = [sys.executable, __file__, "--compile"]
    running = [subprocess.Popen([*command, str(i), str(processes)]) for i in range(processes)]
    for process in running:
        process.wait()


def tune(task: Task, deadline: float) -> tuple[dict[str, int], list[tuple[str, float]]]:
    """-> the entry, and the time of each candidate tried until the deadline (the first one always is)"""
    calls_of = task.prepare(LAYERS)
    times: dict[Config, float] = {}
    for config in task.candidates:
        if times and time.monotonic() > deadline:
            break
        try:
            times[config] = microseconds(calls_of(config))
        except triton.runtime.errors.OutOfResources:
            times[config] = math.inf
    best = min(times, key=times.get)
    rows = [(" ".join(str(n) for n in asdict(config).values()), t) for config, t in times.items()]
    general = calls_of(None)
    if general:
        rows.append(("PyTorch", microseconds(general)))
    return {**task.size, **asdict(best)}, rows


def all_layers(batch: int, fused: bool = True, length: int = 512) -> float:
    """Microseconds of all layers of a decode step."""
    shapes = [(QKV, HIDDEN), (HIDDEN, HEADS * HEAD_DIM), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    slots = batch * length
    layers = [
        ([randn(*shape) / 100 for shape in shapes], (*randn(2, slots, KV_HEADS, HEAD_DIM), None, None))
        for _ in range(LAYERS)
    ]
    x, bias = randn(batch, HIDDEN), randn(QKV)
    table = torch.arange(slots, device=DEVICE, dtype=torch.int32).view(batch, length)
    rows = torch.arange(batch, device=DEVICE, dtype=torch.int32)
    lengths = torch.full_like(rows, length * 3 // 4)
    rope = torch.ones(2, length, HEAD_DIM // 2, device=DEVICE)

    def attend(qkv: Tensor, pool: tuple) -> Tensor:
        return decode_attention(qkv, *rope, *pool, table, rows, lengths, length).flatten(1)

    def fused_layer(qkv: Tensor, out: Tensor, gate_up: Tensor, down: Tensor, pool: tuple) -> None:
        linear_add_(x, attend(norm_linear(x, EPS, qkv, bias), pool), out)
        linear_add_(x, norm_gate_up_silu(x, EPS, gate_up), down)

    def general_layer(qkv: Tensor, out: Tensor, gate_up: Tensor, down: Tensor, pool: tuple) -> None:
        y = add_rms_norm_(x, F.linear(attend(F.linear(x, qkv, bias), pool), out), EPS)
        add_rms_norm_(x, F.linear(silu_mul(F.linear(y, gate_up)), down), EPS)

    layer = fused_layer if fused else general_layer
    return LAYERS * microseconds([lambda w=w, pool=pool: layer(*w, pool) for w, pool in layers])


def tune_fused_rows() -> int:
    """Up to how many rows the fused linears are faster."""
    most = 1
    for batch in (16, 32, 64):
        times = {fused: all_layers(batch, fused) for fused in (True, False)}
        print(
            f"all layers, batch {batch}: fused {times[True]:.0f} us, PyTorch's linears {times[False]:.0f} us"
        )
        if times[True] > times[False]:
            break
        most = batch
    return most


def tune_overlap(batches: list[int]) -> tuple[int, list[dict[str, float]]]:
    """-> up to which of the batches, ascending, overlapping is faster (0: none), and the times of all layers
    without and with it, up to the first batch where it is not"""
    most, table = 0, []
    for batch in batches:
        times = {}
        for rows in (0, sys.maxsize):
            overlap.most_rows = lambda device, chain, rows=rows: rows
            times[rows > 0] = round(all_layers(batch), 1)
        print(f"all layers, batch {batch}: {times[False]} us one by one, {times[True]} us overlapping")
        table.append({"batch": batch, "without_us": times[False], "with_us": times[True]})
        if times[True] >= times[False]:
            break
        most = batch
    return most, table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=90, help="stop trying candidates after this time")
    parser.add_argument("--processes", type=int, default=12, help="that compile")
    parser.add_argument("--output", type=Path, help="the file to write; default: where the kernels look")
    parser.add_argument("--compile", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU")
    overlap.most_rows = lambda device, chain: 0
    if arguments.compile:
        return compile_share(*arguments.compile)
    output = arguments.output or configs.path_of(torch.device(DEVICE))

    begin = time.monotonic()
    compile_all(arguments.processes)
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    found: dict[str, list[dict[str, int]]] = {}
    table: list[tuple[str, list[tuple[str, float]]]] = []
    for task in all_tasks():
        entry, times = tune(task, begin + arguments.seconds)
        found.setdefault(task.kernel, []).append(entry)
        table.append((task.name, times))
    print(f"measured in {time.monotonic() - begin:.0f} s", flush=True)

    def read() -> dict[str, object]:
        return json.loads(output.read_text()) if output.exists() else {}

    def save(**more: object) -> None:
        known = read()
        output.write_text(json.dumps({**known, **found, **more}, indent=2) + "\n")

    save()
    configs.load = lambda device: found
    for cached in (decode_config, linear_config, row_config):
        cached.cache_clear()
    save(fused_rows=tune_fused_rows())
    most, overlap_times = tune_overlap([1, 16, 32, 64])
    save(overlap={**read().get("overlap", {}), "llm": most}, overlap_times=overlap_times)
    for name, times in table:
        print(name)
        fastest = min(t for _, t in times)
        print("  " + ", ".join(f"[{config}] {t:.1f}{'*' * (t == fastest)}" for config, t in times))
    print(f"{output} written in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
