#!/usr/bin/env python3
"""Measures an Euler step of the flow at small numbers of rows on this machine's GPU, with transformer blocks
in five and in three launches (light_tts/kernels/flow/packed_block.py), and their launch configurations. Run
it after tune_flow.py and tune_flow_overlap.py, from whose measurements it starts. Takes about 90 seconds:

    python scripts/tune_flow_blocks.py [--rows 100 500] [--seconds 80] [--write]

Each time is that of whole steps in one CUDA graph, at the sizes of CosyVoice2-0.5B with random weights and
overlapping kernels. Rows are those of both copies of each frame: 500 are the first chunk of one request. `in
use` are the kernels in use, with the measurements known so far; `5` and `3` the best found for so many
launches. Both begin with what is known, and a candidate replaces it only if it is faster by MARGIN when both
are measured in turn. In the same way, what is in use is kept unless `5` or `3` is faster. The error is that
of the velocity, relative to plain PyTorch in float32.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tune_flow
from tune_flow import FEED, HEADS, INNER, WIDTH

from light_tts.kernels import configs
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.flow import euler_step, packed_attention, packed_block, packed_conv, packed_linear
from light_tts.kernels.launch import Config, measured_up_to
from light_tts.models.checkpoint.config import EstimatorConfig
from light_tts.models.flow.cfm import euler_steps
from light_tts.models.flow.packed import FEW_ROWS, _bucket, attention_rows
from light_tts.models.flow.unet import packed as unet
from light_tts.models.flow.unet.estimator import Estimator
from light_tts.models.flow.unet.packed import PackedEstimator
from light_tts.models.flow.unet.page_store import COPIES
from light_tts.models.flow.unet.rows import Rows

ROWS = (100, 200, 250, 500, 1000, 2000)
CHUNK = 50  # frames, of the attention mask of a stream
STEPS = 3  # in a graph
FEW = 128  # rows when only compiling
MARGIN = 0.01  # of the time, by which a candidate must be faster
ALL_ROWS = [[1, 1 << 20]]
VARIANTS = ((3, ALL_ROWS), (5, ALL_ROWS), (5, []))  # launches and overlap of candidates
OVERLAPPING = ("packed_linear", "attend_project", "feed_forward")  # of three launches
QKV, UP = f"layer_norm_linear_{WIDTH}x{3 * INNER}", f"layer_norm_linear_{WIDTH}x{FEED}"
OUT, DOWN = f"packed_linear_add_{INNER}x{WIDTH}", f"packed_linear_add_{FEED}x{WIDTH}"
LINEAR, FORWARD = f"packed_linear_{WIDTH}x{3 * INNER}", f"feed_forward_{WIDTH}x{FEED}"
ATTEND = "attend_project"  # followed by the number of queries

Settings = dict[str, Any]


def candidates(launches: int, rows: int) -> Iterator[tuple[str, list[Config]]]:
    """Yield the kernels of a block in the order in which they are tuned, and their configurations.
    "BLOCK_ROWS" of an attention kernel is the number of queries of a program."""

    def shapes(names: str, *choices: tuple[int, ...]) -> list[Config]:
        return [dict(zip(names.split(), values, strict=True)) for values in choices]

    if launches == 5:
        for kernel in (QKV, UP):
            found = shapes(
                "BLOCK_ROWS BLOCK_OUT TILES EARLY num_warps num_stages",
                *((16, 64, 1, 0, 4, 2), (32, 64, 1, 0, 4, 2), (32, 128, 1, 0, 4, 2), (64, 64, 1, 0, 4, 2)),
                *((64, 128, 1, 0, 8, 2), (32, 64, 1, 1, 4, 2)),
            )
            yield kernel, found
        for kernel in (OUT, DOWN):
            yield (
                kernel,
                shapes(
                    "BLOCK_ROWS BLOCK_OUT BLOCK_IN num_warps num_stages",
                    *((16, 32, 128, 4, 4), (16, 64, 128, 4, 4), (32, 32, 128, 4, 4), (32, 64, 128, 4, 3)),
                    (16, 32, 256, 4, 3),
                ),
            )
        return
    yield (
        LINEAR,
        shapes(
            "BLOCK_ROWS BLOCK_OUT BLOCK_IN num_warps num_stages",
            *((16, 64, 256, 4, 1), (16, 128, 256, 4, 1), (32, 64, 256, 4, 1), (32, 128, 256, 4, 1)),
            *((64, 64, 256, 4, 1), (64, 128, 256, 8, 1), (32, 128, 64, 4, 4), (64, 128, 64, 4, 4)),
        ),
    )
    queries = (16, 32) if rows <= 1024 else (32, 64)
    choices = [
        *itertools.product(queries, (64, 128), (1,), (4, 8), (2,)),
        *itertools.product(queries, (64,), (0,), (4,), (2,)),
    ]
    yield ATTEND, shapes("BLOCK_ROWS BLOCK_KEYS EARLY num_warps num_stages", *choices)
    yield (
        FORWARD,
        shapes(
            "BLOCK_ROWS BLOCK_FEED SPLITS EARLY num_warps num_stages",
            *((16, 64, 16, 1, 8, 2), (16, 64, 16, 1, 16, 2), (16, 128, 8, 1, 8, 2), (16, 128, 4, 0, 8, 2)),
            *((32, 128, 8, 1, 8, 2), (32, 128, 8, 1, 16, 2), (32, 64, 16, 1, 16, 2), (32, 128, 4, 0, 16, 2)),
            *((16, 64, 8, 0, 4, 2), (32, 128, 8, 0, 16, 2), (32, 64, 4, 0, 8, 3)),
        ),
    )


def in_use(settings: Settings, rows: int) -> Config | None:
    """Return the entry "fused_block" for this number of rows."""
    return measured_up_to(settings.get("fused_block", []), rows=rows)


def kernels_of(settings: Settings, rows: int) -> list[str]:
    """Return the keys of the configurations of a block of this number of rows."""
    block = in_use(settings, rows)
    if block is None or block["launches"] == 5:
        return [QKV, OUT, UP, DOWN]
    return [LINEAR, f"{ATTEND}_{block['BLOCK_ROWS']}", FORWARD]


def pinned(settings: Settings, rows: int) -> Settings:
    """Return `settings` with entries for exactly this number of rows, which are those in use for it."""
    settings = copy.deepcopy(settings)
    settings.setdefault("fused_block", [])
    block = in_use(settings, rows) or {"launches": 5}
    settings["fused_block"] = replaced(settings["fused_block"], {"rows": rows, **block})
    for name in kernels_of(settings, rows):
        entries = settings.get(name, [])
        if entries:
            config = measured_up_to(entries, rows=min(rows, max(entry["rows"] for entry in entries)))
            settings[name] = replaced(entries, {"rows": rows, **config})
    return settings


def replaced(entries: list[Config], new: Config) -> list[Config]:
    """Return the entries by rows, with `new` instead of that for the same number of rows."""
    others = [entry for entry in entries if entry["rows"] != new["rows"]]
    return sorted([*others, new], key=lambda entry: entry["rows"])


def first_settings(known: Settings, rows: int, launches: int) -> Settings:
    """Return what is known about blocks of this number of rows in so many launches, for all kernels of such a
    block; where nothing is known about three launches, their first candidates, which overlap."""
    settings = copy.deepcopy(known)
    block = in_use(settings, rows)
    if (block["launches"] if block else 5) == launches:
        return pinned(settings, rows)
    settings.setdefault("fused_block", [])
    if launches == 5:
        settings["fused_block"] = replaced(settings["fused_block"], {"rows": rows, "launches": 5})
        return pinned(settings, rows)
    overlaps = settings.setdefault("overlap", {})
    overlaps |= dict.fromkeys(OVERLAPPING, ALL_ROWS)
    queries = 32 if rows <= 1024 else 64
    block = {"rows": rows, "launches": 3, "BLOCK_ROWS": queries}
    settings["fused_block"] = replaced(settings["fused_block"], block)
    for kernel, choices in candidates(3, rows):
        config = next(each for each in choices if kernel != ATTEND or each["BLOCK_ROWS"] == queries)
        settings = with_config(settings, kernel, config, rows)
    return settings


def overlapped(settings: Settings) -> Settings:
    """Return `settings` in which a linear layer after a norm overlaps at all sizes, and prefetches its
    weights."""
    settings = copy.deepcopy(settings)
    settings.setdefault("overlap", {})["layer_norm_linear"] = ALL_ROWS
    for kernel in (QKV, UP):
        for entry in settings.get(kernel, []):
            entry["EARLY"] = 0
    return settings


def with_config(settings: Settings, kernel: str, config: Config, rows: int) -> Settings:
    """Return `settings` with this configuration of the kernel for `rows`."""
    settings = copy.deepcopy(settings)
    name, entry = kernel, {"rows": rows, **config}
    if kernel == ATTEND:
        queries = entry.pop("BLOCK_ROWS")
        block = {"rows": rows, "launches": 3, "BLOCK_ROWS": queries}
        settings["fused_block"] = replaced(settings["fused_block"], block)
        name = f"{kernel}_{queries}"
    settings[name] = replaced(settings.get(name, []), entry)
    return settings


def use(settings: Settings) -> None:
    configs.load = lambda device: settings


class Case:
    """Times whole steps of `rows` rows of both copies: sequences of up to 250 frames with chunks, except for
    the last, which has full attention if there is more than one."""

    def __init__(self, model: Estimator, estimator: PackedEstimator, rows: int) -> None:
        frames = rows // COPIES
        self.rows, self.size = rows, _bucket(frames)
        self._lengths = [min(250, frames - start) for start in range(0, frames, 250)]
        self._estimator = estimator
        self._position = np.concatenate([np.arange(length) for length in self._lengths])
        generator = torch.Generator("cuda").manual_seed(rows)
        draw = torch.randn(COPIES * self.size, estimator._inputs, device="cuda", generator=generator)
        self._inputs = draw.to(torch.float16).float()
        self._x = self._inputs[: self.size, : estimator.mels].clone()
        self._inputs[:, : estimator.mels] = self._x.repeat(COPIES, 1)
        self._model = model

    @property
    def bucket(self) -> int:
        """The number of rows for which there are configurations."""
        return COPIES * self.size

    def _rows(self, estimator: PackedEstimator) -> tuple[Rows, Callable[[], None]]:
        """Return rows for the settings in use, and what fills them."""
        fused = packed_block.fused_queries(estimator.device, estimator.dtype, self.bucket)
        queries = fused or attention_rows(self.size)
        few = self.size <= FEW_ROWS
        buffers = estimator.allocate(self.size).first(self.size, few, fused is not None)
        rows = Rows(buffers, self.size // queries + 8, queries)
        table = rows.empty()
        parts = rows.parts(table)
        parts.position.reshape(COPIES, -1)[:, : len(self._position)] = self._position
        chunks = [CHUNK] * len(self._lengths)
        if len(chunks) > 1:
            chunks[-1] = 0
        parts.blocks[:] = packed_attention.attention_blocks(self._lengths, chunks, queries, len(parts.blocks))
        on_device = torch.from_numpy(table).cuda()

        def fill() -> None:
            rows.table.copy_(on_device)
            buffers.x.copy_(self._x)
            buffers.inputs.copy_(self._inputs)

        return rows, fill

    def step(self) -> None:
        self._estimator.step(self._rows(self._estimator)[0])

    def velocity(self, estimator: PackedEstimator) -> torch.Tensor:
        """Return the change of x by one step."""
        rows, fill = self._rows(estimator)
        fill()
        estimator.step(rows)
        return (rows.buffers.x - self._x)[: len(self._position)]

    def reference(self) -> torch.Tensor:
        """Return the velocity of plain PyTorch in float32."""
        estimator = PackedEstimator(self._model, euler_steps(10), 0.7, torch.float32)
        replaced = {
            "flow_step": euler_step.flow_step_reference,
            "packed_linear": packed_linear.packed_linear_reference,
            "packed_linear_add_": packed_linear.packed_linear_add_reference_,
            "layer_norm_linear": packed_linear.layer_norm_linear_reference,
            "packed_attention": packed_attention.packed_attention_reference,
            "packed_conv": packed_conv.packed_conv_reference,
        }
        kernels = {name: getattr(unet, name) for name in replaced}
        try:
            for name, function in replaced.items():
                setattr(unet, name, function)
            return self.velocity(estimator)
        finally:
            for name, function in kernels.items():
                setattr(unet, name, function)

    def timer(self) -> Callable[[int], float]:
        """Return a function that returns the median of some replays with the settings in use, in
        milliseconds per step."""
        rows, fill = self._rows(self._estimator)
        fill()
        self._estimator.step(rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for _ in range(STEPS):
            self._estimator.step(rows)
        graph.capture_end()

        def measure(replays: int) -> float:
            times = []
            for _ in range(replays + 1):
                fill()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / STEPS)
            return statistics.median(times[1:])

        return measure


def model_of(blocks: int, middle: int) -> Estimator:
    """Return an estimator of full width with random weights."""
    torch.manual_seed(0)
    config = EstimatorConfig(
        in_channels=320,
        out_channels=80,
        channels=WIDTH,
        n_blocks=blocks,
        num_mid_blocks=middle,
        num_heads=HEADS,
        attention_head_dim=INNER // HEADS,
        static_chunk_size=CHUNK,
    )
    with torch.device("cuda", 0):
        return Estimator(config, 1024).requires_grad_(False)


def call_of(kernel: str) -> Callable[[], object]:
    """Return a call of the kernel of a block on a few random rows."""
    name, _, shape = kernel.rpartition("_")
    if name in ("layer_norm_linear", "packed_linear", "packed_linear_add"):
        return tune_flow.call_of(name, *map(int, shape.split("x")), FEW)

    def draw(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    projected = draw(HEADS, FEW, WIDTH)
    if name == "feed_forward":
        up, down = ((draw(a, b), draw(b, dtype=torch.float32)) for a, b in ((WIDTH, FEED), (FEED, WIDTH)))
        position = torch.zeros(FEW, dtype=torch.int32, device="cuda")
        buffers = packed_block.FeedBuffers.of(FEW, WIDTH, torch.device("cuda", 0))
        return lambda: packed_block.feed_forward(
            draw(FEW, WIDTH), projected, down[1], up, down, position, buffers, draw(FEW, WIDTH), 1e-5
        )
    queries = packed_block.fused_queries(torch.device("cuda", 0), torch.float16, FEW)
    assert queries is not None  # see first_settings
    table = packed_attention.attention_blocks([FEW // COPIES], [CHUNK], queries, 8)
    blocks, weight = torch.from_numpy(table).cuda(), draw(INNER, WIDTH)
    qkv = draw(FEW, 3 * INNER)
    return lambda: packed_attention.attend_project(qkv, blocks, weight, projected, queries, COPIES)


def compile_some(share: list[tuple[str, Settings]]) -> None:
    """Compile kernels with these settings into Triton's on-disk cache."""
    for kernel, settings in share:
        use(settings)
        try:
            call_of(kernel)()
        except Exception as error:  # too large for this GPU: raised again and skipped when measured
            print(f"{kernel}: {type(error).__name__}: {str(error)[:100]}", flush=True)


def compile_all(known: Settings, cases: list[Case]) -> None:
    """Compile all candidates in other processes, and what else a step needs in this one."""
    jobs: list[tuple[str, Settings]] = []
    large = {case.bucket > 1024 for case in cases}
    for (launches, overlap), some_large in itertools.product(VARIANTS, sorted(large)):
        start = first_settings(known, FEW, launches)
        names = OVERLAPPING if launches == 3 else ("layer_norm_linear", "packed_linear_add")
        start["overlap"] = start.get("overlap", {}) | dict.fromkeys(names, overlap)
        for kernel, choices in candidates(launches, 2048 if some_large else FEW):
            tried = [(kernel, with_config(start, kernel, config, FEW)) for config in choices]
            jobs += [job for job in tried if job not in jobs]
    workers = min(16, os.cpu_count() or 1)
    print(f"compiling {len(jobs)} variants in {workers} processes", flush=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        compiled = pool.map_async(compile_some, [jobs[index::workers] for index in range(workers)], 1)
        compile_ahead(torch.device("cuda", 0), lambda: rehearse(known, cases))
        compiled.get()


def rehearse(known: Settings, cases: list[Case]) -> None:
    for case in cases:
        for settings in (known, first_settings(known, case.bucket, 5), first_settings(known, case.bucket, 3)):
            use(settings)
            case.step()


def in_turn(timers: dict[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
    """Return the median of each timer, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer(4))
    return {name: statistics.median(each) for name, each in times.items()}


def best_of(times: dict[str, float]) -> str:
    """Return the fastest, or "in use" if no other is faster than that by MARGIN."""
    best = min(times, key=lambda name: times[name])
    return best if times[best] < (1 - MARGIN) * times["in use"] else "in use"


def tune(case: Case, settings: Settings, launches: int, deadline: float) -> Settings:
    """Return `settings` with the candidates that were faster, one kernel after the other."""
    changes = [
        (f"{kernel} {config}", partial(with_config, kernel=kernel, config=config, rows=case.bucket))
        for kernel, choices in candidates(launches, case.bucket)
        for config in choices
    ]
    if launches == 5:
        changes.insert(0, ("overlap", overlapped))
    use(settings)
    timer = case.timer()
    for name, change in changes:
        if time.monotonic() > deadline:
            break
        tried = change(settings)
        use(tried)
        try:
            other = case.timer()
        except Exception as error:
            print(f"  {name}: {type(error).__name__}", flush=True)
            continue
        if best_of(in_turn({"in use": timer, "other": other}, rounds=3)) == "other":
            settings, timer = tried, other
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of both copies of each frame")
    parser.add_argument("--seconds", type=float, default=80, help="after which no candidates are tried")
    parser.add_argument("--write", action="store_true", help="the best to light_tts/kernels/configs/")
    parser.add_argument("--output", type=Path, help="write them to this file instead")
    args = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda", 0)
    load, known = configs.load, configs.load(device)
    if QKV not in known:
        parser.error("nothing is known about this GPU: run scripts/tune_flow.py first")
    torch.cuda.set_stream(torch.cuda.Stream())
    torch.set_grad_enabled(False)
    model = model_of(4, 12)
    estimator = PackedEstimator(model, euler_steps(10), 0.7, torch.float16)
    cases = [Case(model, estimator, rows) for rows in sorted(args.rows)]
    compile_all(known, cases)
    print(f"{torch.cuda.get_device_name()}, compiled after {time.monotonic() - started:.0f} s", flush=True)
    found = copy.deepcopy(known)
    lines = []
    buckets = [list(group) for _, group in itertools.groupby(cases, lambda case: case.bucket)]
    for index, same in enumerate(buckets):
        rows = same[-1].bucket
        chosen = {"in use": pinned(known, rows)}
        for left, launches in ((2, 3), (1, 5)):
            now = time.monotonic()
            share = (started + args.seconds - now) / (len(buckets) - index) / left
            start = first_settings(known, rows, launches)
            chosen[str(launches)] = tune(same[-1], start, launches, now + share)
        total = dict.fromkeys(chosen, 0.0)
        for case in same:
            expected = case.reference()
            errors, timers = {}, {}
            for name, settings in chosen.items():
                use(settings)
                errors[name] = ((case.velocity(estimator) - expected).norm() / expected.norm()).item()
                timers[name] = case.timer()
            times = in_turn(timers, rounds=5)
            total = {name: total[name] + times[name] for name in total}
            cells = (f"{name}: {times[name]:.3f} ms ({errors[name]:.1e})" for name in times)
            lines.append(f"{case.rows:5} rows  " + "  ".join(cells))
            print(lines[-1], flush=True)
        for launches, settings in chosen.items():
            for name in kernels_of(settings, rows):
                config = next((entry for entry in settings.get(name, []) if entry["rows"] == rows), None)
                print(f"    {launches}: {name} {config or 'as by default'}")
        best = best_of(total)
        print(f"    up to {rows} rows: {best}")
        keep(found, chosen[best], rows)
    print("\nms per Euler step, relative error in parentheses\n" + "\n".join(lines))
    if args.write or args.output:
        configs.load = load
        configs.save(device, found, args.output)


def keep(found: Settings, chosen: Settings, rows: int) -> None:
    """Add to `found` what is in use in `chosen` for this number of rows."""
    fused = found.setdefault("fused_block", [])
    below = max((entry["rows"] for entry in fused if entry["rows"] < rows), default=0)
    for name in ("fused_block", *kernels_of(chosen, rows)):
        for entry in chosen.get(name, []):
            if entry["rows"] == rows:
                found[name] = replaced(found.get(name, []), entry)
    for name, ranges in chosen.get("overlap", {}).items():
        if ranges == ALL_ROWS:
            overlaps = found.setdefault("overlap", {})
            overlaps[name] = joined([*overlaps.get(name, []), [below + 1, rows]])


def joined(ranges: list[list[int]]) -> list[list[int]]:
    """Return the same rows in as few ranges [first, last] as possible, in ascending order."""
    found: list[list[int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1][1] = max(found[-1][1], last)
        else:
            found.append([first, last])
    return found


if __name__ == "__main__":
    main()
