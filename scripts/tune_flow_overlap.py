#!/usr/bin/env python3
"""Measures for which sizes the flow is faster with overlapping kernels (light_tts/kernels/overlap.py) on this
machine's GPU, and writes the result to light_tts/kernels/configs/. Run it after tune_flow.py; takes about a
minute:

    python scripts/tune_flow_overlap.py [--most_rows 1024]

Whole solves are timed, because a kernel may slow others down. Beyond --most_rows nothing overlaps: the
waiting programs of large batches take resources from other processes on the GPU, which is not measured here.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bench_flow import full_size, item, milliseconds

from light_tts.kernels import configs, overlap
from light_tts.models.flow.pack import pack
from light_tts.models.flow.packed import PackedFlow

KERNELS = {
    "grouped_conv",
    "layer_norm_linear",
    "modulated_norm",
    "packed_linear",
    "packed_linear_add",
    "packed_attention",
    "packed_conv",
    "flow_step",
    "relative_attention",
    "row_norm",
    "shifted_linear",
}
# Kernels excluded from overlapping: those seen to become slower at some sizes.
CHOICES = [KERNELS, set(), {"layer_norm_linear"}, {"packed_conv"}, {"layer_norm_linear", "packed_conv"}]
FIRST, WHOLE = (41, True, False), (125, False, True)  # tokens, streaming, finalize


@dataclass(frozen=True)
class Case:
    """`requests` concurrent chunks; the best choice for them is used up to `rows`."""

    chunk: tuple[int, bool, bool]
    requests: int
    rows: int


CASES = [
    Case(FIRST, 1, 512),
    Case(WHOLE, 1, 1024),
    Case(FIRST, 4, 2048),
    Case(FIRST, 8, 4096),
    Case(FIRST, 32, 16384),
]

Ranges = dict[str, list[list[int]]]


def ranges_of(best: dict[int, set[str]]) -> Ranges:
    """best: the overlapping kernels by maximum number of rows, in ascending order -> by kernel, [first, last]
    rows"""
    found: Ranges = {}
    first = 1
    for last, kernels in best.items():
        for kernel in sorted(kernels):
            ranges = found.setdefault(kernel, [])
            if ranges and ranges[-1][1] == first - 1:
                ranges[-1][1] = last
            else:
                ranges.append([first, last])
        first = last + 1
    return found


def _overlaps(left_out: set[str], device: torch.device, kernel: str, rows: int) -> bool:
    return kernel not in left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--most_rows", type=int, default=1024, help="of a batch, both copies of each frame")
    parser.add_argument("--output", type=Path, help="instead of the file of this GPU")
    args = parser.parse_args()
    torch.cuda.set_stream(torch.cuda.Stream())
    torch.set_grad_enabled(False)
    flow = full_size("cuda")
    parts, half = pack(flow, torch.float16), copy.deepcopy(flow).half()
    best: dict[int, set[str]] = {}
    for case in CASES:
        if case.rows > args.most_rows:
            break
        items = [item(seed, *case.chunk) for seed in range(case.requests)]
        times = {}
        for left_out in CHOICES:
            overlap.enabled = partial(_overlaps, left_out)
            packed = PackedFlow(half, *parts, items=len(items))  # with its own graphs
            packed.graphs.at_first_use = True
            packed(items)
            times[frozenset(KERNELS - left_out)] = milliseconds(partial(packed, items))
        chosen = min(times, key=times.__getitem__)
        best[case.rows] = set(chosen)
        shown = ", ".join(f"{'+'.join(sorted(kernels)) or 'none'} {ms:.2f}" for kernels, ms in times.items())
        print(f"up to {case.rows} rows, ms: {shown}", flush=True)
    device = torch.device("cuda")
    llm = {"llm": configs.load(device).get("overlap", {}).get("llm", [])}
    configs.save(device, {"overlap": {**llm, **ranges_of(best)}}, args.output)


if __name__ == "__main__":
    main()
