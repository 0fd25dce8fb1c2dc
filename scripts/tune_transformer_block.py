#!/usr/bin/env python3
"""Measures an Euler step of the flow on this machine's GPU (an H100 or H200), with transformer blocks in five
kernels and in one (light_tts/kernels/flow/transformer_block.py), with tiles of 16 and 32 rows; and, with
the best of these, with residual blocks in three kernels and in one (resnet_block.py). Run it after
tune_flow.py and tune_flow_overlap.py. Takes about three minutes:

    python scripts/tune_transformer_block.py [--rows 128 512] [--chunk_rows 200] [--write]

Each time is that of whole steps in one CUDA graph, at the sizes of CosyVoice2-0.5B with random weights. Rows
are those of both copies of each frame: 500 are the first chunk of one request without cached state, 200 with
a known voice. Batches of later chunks of streams, 50 frames each with cached state, have --chunk_rows. Of
sizes measured with both, these decide what is written. The error is that of the velocity, relative to plain
PyTorch in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tune_flow import HEADS, INNER, WIDTH

from light_tts.kernels import configs
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.cuda.kernel import available
from light_tts.kernels.flow import (
    euler_step,
    layer_norm_linear,
    packed_attention,
    packed_conv,
    packed_linear,
    resnet_block,
    transformer_block,
)
from light_tts.kernels.flow.packed_attention import Prefix
from light_tts.models.checkpoint.cosyvoice2_config import EstimatorConfig
from light_tts.models.flow.cfm import euler_steps
from light_tts.models.flow.packed import _bucket, attention_rows
from light_tts.models.flow.packed_rows import Rows
from light_tts.models.flow.page_store import ANY_PAGES, COPIES, PageStore
from light_tts.models.flow.unet import packed as unet
from light_tts.models.flow.unet.estimator import Estimator
from light_tts.models.flow.unet.packed import PackedEstimator

ROWS = (100, 200, 500, 1000, 2000, 4000, 8000)
CHUNK_ROWS = (200, 400, 800)
CHUNK = 50  # frames, of the attention mask of a stream and of a page
PAST = 150  # frames in pages: a prompt of 3 s
LENGTH = {True: 100, False: 250}  # frames of a sequence with and without a past
STEPS = 3  # in a graph
MOST = 1 << 20


class Variant(NamedTuple):
    """tile: rows of a tile of transformer blocks, None: five kernels; resnet_tile: of residual blocks, None:
    three kernels."""

    tile: int | None
    overlap: bool
    resnet_tile: int | None = None
    resnet_overlap: bool = False

    def __str__(self) -> str:
        blocks = f"{self.tile}{', overlapping' if self.overlap else ''}" if self.tile else "five kernels"
        if self.resnet_tile is None:
            return blocks
        return f"{blocks} + {self.resnet_tile}{', overlapping' if self.resnet_overlap else ''}"


VARIANTS = [
    Variant(None, False),
    *(Variant(tile, True) for tile in transformer_block.BLOCK_ROWS),
]


def with_resnets(variant: Variant) -> list[Variant]:
    """Return it with all variants of residual blocks in one kernel."""
    return [Variant(variant.tile, variant.overlap, tile, True) for tile in resnet_block.BLOCK_ROWS]


@contextlib.contextmanager
def use(variant: Variant) -> Iterator[None]:
    """Context manager in which the kernels are those of the variant."""
    load, known = configs.load, configs.load(torch.device("cuda", 0))
    rows = {"transformer_block": variant.tile, "resnet_block": variant.resnet_tile}
    overlaps = {"transformer_block": variant.overlap, "resnet_block": variant.resnet_overlap}
    settings = known | {
        name: [{"rows": MOST, "BLOCK_ROWS": tile}] if tile else [] for name, tile in rows.items()
    }
    ranges = {name: [[1, MOST]] if overlap else [] for name, overlap in overlaps.items()}
    settings["overlap"] = known.get("overlap", {}) | ranges
    configs.load = lambda device: settings
    try:
        yield
    finally:
        configs.load = load


class Case:
    """Times whole steps of `rows` rows of both copies: sequences of `longest` frames with chunks, except for
    the last, which has full attention if there is more than one. store: for sequences that continue PAST
    cached frames; None: they begin."""

    def __init__(
        self, model: Estimator, estimator: PackedEstimator, rows: int, store: PageStore | None, longest: int
    ) -> None:
        frames = rows // COPIES
        self.longest = longest
        self._lengths = [min(longest, frames - start) for start in range(0, frames, longest)]
        edges = resnet_block.HALO * (len(self._lengths) - 1)  # see lines_of
        self.rows, self.size, self.store = rows, _bucket(frames + edges), store
        self._estimator, self._model = estimator, model
        self._position = np.concatenate([np.arange(length) for length in self._lengths])
        generator = torch.Generator("cuda").manual_seed(rows)
        draw = torch.randn(COPIES * self.size, estimator._inputs, device="cuda", generator=generator)
        self._inputs = draw.to(torch.float16).float()
        self._x = self._inputs[: self.size, : estimator.mels].clone()
        self._inputs[:, : estimator.mels] = self._x.repeat(COPIES, 1)

    def _rows(self, estimator: PackedEstimator) -> tuple[Rows, Callable[[], None]]:
        """Return rows for the settings in use, and what fills them."""
        tile = estimator.rows_of_tile(COPIES * self.size)
        queries = tile or attention_rows(self.size)
        buffers = estimator.part(estimator.allocate(self.size), self.size)
        count, pages = len(self._lengths), PAST // CHUNK
        tile_rows = estimator.rows_of_resnet_tile(COPIES * self.size)
        blocks = 0 if tile else self.size // queries + count
        rows = Rows(buffers, blocks, queries, self.store, count * pages, tile_rows)
        table = rows.empty()
        parts = rows.parts(table)
        parts.position.reshape(COPIES, -1)[:, : len(self._position)] = self._position
        chunks = [CHUNK] * count
        if count > 1:
            chunks[-1] = 0
        prefixes = None
        if self.store is not None:
            prefixes = [Prefix(PAST, pages * index, PAST) for index in range(count)]
            parts.pages[:] = np.arange(count * pages) % self.store.pages
            starts = np.cumsum([0, *self._lengths])
            for start, length in zip(starts, self._lengths, strict=False):
                before = parts.before.reshape(COPIES, -1)
                before[:, start : start + length] = pages - 1
        rows.place_attention(parts, self._lengths, chunks, prefixes)
        if tile_rows is not None:
            before = None if self.store is None else parts.before
            parts.lines[:] = resnet_block.lines_of(self._lengths, len(parts.lines), before)
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
            "layer_norm_linear": layer_norm_linear.layer_norm_linear_reference,
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


def model_of() -> Estimator:
    """Return an estimator of full size with random weights."""
    torch.manual_seed(0)
    config = EstimatorConfig(
        in_channels=320,
        out_channels=80,
        channels=WIDTH,
        n_blocks=4,
        num_mid_blocks=12,
        num_heads=HEADS,
        attention_head_dim=INNER // HEADS,
        static_chunk_size=CHUNK,
    )
    with torch.device("cuda", 0):
        return Estimator(config, 1024).requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of both copies of each frame")
    parser.add_argument("--chunk_rows", type=int, nargs="*", default=CHUNK_ROWS, help="of later chunks")
    parser.add_argument("--write", action="store_true", help="the best to light_tts/kernels/configs/")
    parser.add_argument("--output", type=Path, help="write them to this file instead")
    parser.add_argument("--json", type=Path, help="all times")
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    if not available(device):
        parser.error("this GPU has no kernel for whole transformer blocks")
    started = time.monotonic()
    torch.cuda.set_stream(torch.cuda.Stream())
    torch.set_grad_enabled(False)
    model = model_of()
    estimator = PackedEstimator(model, euler_steps(10), 0.7, torch.float16)
    store = estimator.keep(6 << 30, CHUNK, ANY_PAGES)
    for each in [*store.layers, *store.edges]:
        each.normal_()
    cases = [
        Case(model, estimator, rows, kept, LENGTH[kept is not None])
        for rows in sorted(args.rows)
        for kept in (None, store)
    ]
    cases += [Case(model, estimator, rows, store, CHUNK) for rows in sorted(args.chunk_rows)]

    def rehearse() -> None:
        for variant in [*VARIANTS, *with_resnets(VARIANTS[0])]:
            with use(variant):
                for case in cases:
                    case.step()

    compile_ahead(device, rehearse)
    print(f"{torch.cuda.get_device_name()}, compiled after {time.monotonic() - started:.0f} s", flush=True)
    chosen: dict[int, Variant] = {}  # by rows, as on a server: with cached state
    found = []
    for case in cases:
        times, errors = measure(case, estimator)
        named = {"ms": times, "error": errors}
        plain = {key: {str(each): value for each, value in of.items()} for key, of in named.items()}
        found.append({"rows": case.rows, "longest": case.longest, "cached": case.store is not None, **plain})
        cells = (f"{each} {times[each]:.3f} ({errors[each]:.1e})" for each in times)
        cached = ", cached" if case.store else ""
        name = f"{case.rows:5} rows, up to {case.longest:3} frames each{cached:8} "
        print(name + "  ".join(cells), flush=True)
        if case.store is not None:
            chosen[COPIES * case.size] = best_of(times)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.write or args.output:
        configs.save(device, settings_of(chosen, configs.load(device).get("overlap", {})), args.output)


Times = dict[Variant, float]


def best_of(times: Times) -> Variant:
    return min(times, key=lambda each: times[each])


def settings_of(chosen: dict[int, Variant], overlaps: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for the variants chosen for these rows; overlaps: those of all kernels so far."""
    entries: dict[str, Any] = {"transformer_block": [], "resnet_block": []}
    ranges: dict[str, Any] = {name: [] for name in entries}
    for rows, best in sorted(chosen.items()):
        of_both = (best.tile, best.overlap), (best.resnet_tile, best.resnet_overlap)
        for name, (tile, overlap) in zip(entries, of_both, strict=True):
            entries[name].append({"rows": rows, "BLOCK_ROWS": tile or 0})
            if overlap:
                ranges[name] = [[1, rows]]
    return entries | {"overlap": overlaps | ranges}


def measure(case: Case, estimator: PackedEstimator) -> tuple[Times, Times]:
    """Return milliseconds and error of each variant, measured in turn: first of transformer blocks, then of
    residual blocks with the best one."""
    expected, errors = case.reference(), {}

    def compare(variants: list[Variant]) -> Times:
        timers = {}
        times: dict[Variant, list[float]] = {each: [] for each in variants}
        for each in variants:
            with use(each):
                velocity = case.velocity(estimator)
                errors[each] = ((velocity - expected).norm() / expected.norm()).item()
                timers[each] = case.timer()
        for _ in range(3):
            for each, timer in timers.items():
                times[each].append(timer(4))
        return {each: statistics.median(found) for each, found in times.items()}

    times = compare(VARIANTS)
    best = best_of(times)
    return times | compare([best, *with_resnets(best)]), errors


if __name__ == "__main__":
    main()
