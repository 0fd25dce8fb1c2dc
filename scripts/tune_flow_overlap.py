#!/usr/bin/env python3
"""Measures for which sizes the flow is faster with overlapping kernels (light_tts/kernels/overlap.py) on this
machine's GPU, and writes the result to light_tts/kernels/configs/. Run it after tune_flow.py; takes about a
minute:

    python scripts/tune_flow_overlap.py [--family cosyvoice3] [--most_rows 1024]

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
from bench_flow import FAMILIES, item, milliseconds

from light_tts.kernels import configs, overlap
from light_tts.models.flow.packed import PackedFlow

# Kernels of each family whose overlap is chosen. What CosyVoice3 shares with CosyVoice2 overlaps as for that.
KERNELS = {
    "cosyvoice2": {
        "layer_norm_linear",
        "packed_linear_256x1536",
        "packed_linear_256x1024",
        "packed_linear_512x1536",
        "packed_linear_512x2048",
        "packed_linear_add",
        "packed_attention",
        "packed_conv",
        "flow_step",
        "relative_attention",
        "row_norm",
        "shifted_linear",
    },
    "cosyvoice3": {
        "grouped_conv",
        "modulated_norm",
        "packed_linear_320x1024",
        "packed_linear_1024x3072",
        "packed_linear_1024x2048",
    },
}
# Kernels excluded from overlapping: those seen to become slower at some sizes.
CHOICES: dict[str, list[set[str]]] = {
    "cosyvoice2": [
        set(),
        KERNELS["cosyvoice2"],
        {"layer_norm_linear"},
        {"packed_conv"},
        {"layer_norm_linear", "packed_conv"},
    ],
    "cosyvoice3": [
        set(),
        KERNELS["cosyvoice3"],
        {"grouped_conv"},
        {"modulated_norm"},
        {"packed_linear_1024x3072", "packed_linear_1024x2048"},
    ],
}
MEASURED = overlap.enabled
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


def _overlaps(chosen: set[str], family: set[str], device: torch.device, kernel: str, rows: int) -> bool:
    """Replaces `overlap.enabled`: of the kernels `family` those that are `chosen` overlap, others as measured
    before."""
    return kernel in chosen if kernel in family else MEASURED(device, kernel, rows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--most_rows", type=int, default=1024, help="of a batch, both copies of each frame")
    parser.add_argument("--output", type=Path, help="instead of the file of this GPU")
    parser.add_argument("--family", choices=FAMILIES, default="cosyvoice2")
    args = parser.parse_args()
    torch.cuda.set_stream(torch.cuda.Stream())
    family, kernels = FAMILIES[args.family], KERNELS[args.family]
    flow = family.full_size("cuda")
    parts, half = family.pack(flow, torch.float16), copy.deepcopy(flow).half()
    best: dict[int, set[str]] = {}
    for case in CASES:
        if case.rows > args.most_rows:
            break
        items = [item(seed, *case.chunk) for seed in range(case.requests)]
        times = {}
        for left_out in CHOICES[args.family]:
            overlap.enabled = partial(_overlaps, kernels - left_out, kernels)
            packed = PackedFlow(half, *parts, items=len(items))  # with its own graphs
            packed.graphs.at_first_use = True
            packed(items)
            times[frozenset(kernels - left_out)] = milliseconds(partial(packed, items))
        chosen = min(times, key=times.__getitem__)
        best[case.rows] = set(chosen)
        shown = ", ".join(f"{'+'.join(sorted(each)) or 'none'} {ms:.2f}" for each, ms in times.items())
        print(f"up to {case.rows} rows, ms: {shown}", flush=True)
    device = torch.device("cuda")
    ranges = dict(configs.load(device).get("overlap", {}))
    for kernel in kernels:
        ranges.pop(kernel, None)
    configs.save(device, {"overlap": {**ranges, **ranges_of(best)}}, args.output)


if __name__ == "__main__":
    main()
