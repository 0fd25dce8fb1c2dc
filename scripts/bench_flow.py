"""Speed of the flow alone on a GPU, with random weights of the sizes of CosyVoice2-0.5B or
Fun-CosyVoice3-0.5B.

    python scripts/bench_flow.py [--family cosyvoice3] [--json FILE] [--profile] [--overlap on|off]
        [--memory MIB]

Each line: a number of concurrent requests, each with a prompt of 87 tokens (3.5 s): either a first streamed
chunk (38 new tokens and 3 of look-ahead, chunk mask) or a whole part of 125 tokens (5 s). Milliseconds are
medians, from ids on the host to mel frames on the device, or to encoded tokens; the error is relative to the
plain float32 flow.

With `--memory`, each request is a stream with its own voice that is spoken twice: with cached state
(--flow_memory_gpu_mb) and without it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from light_tts.kernels import overlap
from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.dit.pack import pack as dit_pack
from light_tts.models.flow.encoder_table import TableEncoder
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.memos import Memo
from light_tts.models.flow.pack import pack
from light_tts.models.flow.packed import PackedFlow
from light_tts.models.flow.packed_memory import remember
from light_tts.models.flow.padded import PaddedFlow
from light_tts.models.flow.step_estimator import StepEstimator
from light_tts.tools import tiny_cosyvoice3
from light_tts.tools.random_weights import RandomWeights
from light_tts.tools.tiny_checkpoint import SIZES, TEMPLATE, flow_shapes, flow_state

PROMPT = 87


class Work(NamedTuple):
    """The work of an estimator in 10 guided steps. gflop: for a frame, without the part of attention that
    grows with the length; layers: of attention; inner: channels of a key."""

    gflop: float
    layers: int
    inner: int

    def of(self, frames: int, length: int) -> float:
        """Return GFLOP for frames of items of this length."""
        return frames * (self.gflop + 20 * self.layers * 4 * length * self.inner / 1e9)


class Family(NamedTuple):
    full_size: Callable[[str], BaseFlow]
    pack: Callable[[Any, torch.dtype], tuple[StepEstimator[Any], TableEncoder]]
    work: Work


def full_size(device: str) -> Flow:
    """Return CosyVoice2's flow in float32 with random weights."""
    sizes = SIZES["full"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cosyvoice2.yaml").write_text(TEMPLATE.read_text().format(**asdict(sizes)))
        config = load_config(Path(folder))
    with torch.device("meta"):
        flow = Flow(config.flow, flow_shapes(sizes))
    flow.load_state_dict(flow_state(RandomWeights(0).like(flow)), assign=True)
    return flow.to(device).eval().requires_grad_(False)


def full_size_dit(device: str) -> DiTFlow:
    """Return CosyVoice3's flow in float32 with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = asdict(tiny_cosyvoice3.SIZES["full"])
        text = tiny_cosyvoice3.TEMPLATE.read_text().format(**sizes)
        (Path(folder) / "cosyvoice3.yaml").write_text(text)
        config = load_config3(Path(folder))
    with torch.device("meta"):
        flow = DiTFlow(config.flow)
    flow.load_state_dict(tiny_cosyvoice3.flow_state(RandomWeights(0).like(flow)), assign=True)
    return flow.to(device).eval().requires_grad_(False)


FAMILIES = {
    "cosyvoice2": Family(full_size, pack, Work(2.84, 56, 512)),
    "cosyvoice3": Family(full_size_dit, dit_pack, Work(7.57, 22, 1024)),
}


def item(seed: int, tokens: int, streaming: bool, finalize: bool) -> FlowItem:
    random = np.random.default_rng(seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    return FlowItem(
        prompt=random.integers(0, 6561, PROMPT).astype(np.int32),
        prompt_mel=torch.randn(2 * PROMPT, 80, device="cuda", generator=generator) - 5,
        embedding=torch.randn(192, device="cuda", generator=generator),
        tokens=random.integers(0, 6561, tokens).tolist(),
        streaming=streaming,
        finalize=finalize,
    )


def milliseconds(call: Callable[[], object], seconds: float = 0.6) -> float:
    """Return the median of at least 5 synchronized calls."""
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 100):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="cosyvoice2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--batches", default="1,4,8,16,32")
    parser.add_argument("--profile", action="store_true", help="kernels of one step, by time")
    parser.add_argument("--memory", type=int, default=0, metavar="MIB", help="of earlier frames, compared")
    parser.add_argument("--overlap", choices=("on", "off"), help="of kernels; default: as measured")
    args = parser.parse_args()
    if args.overlap:
        overlap.enabled = lambda *_: args.overlap == "on"
    dtype = getattr(torch, args.dtype)
    torch.cuda.set_stream(torch.cuda.Stream())
    family = FAMILIES[args.family]
    flow32 = family.full_size("cuda")
    parts = family.pack(flow32, dtype)
    packed = PackedFlow(copy.deepcopy(flow32).to(dtype), *parts, items=32)
    packed.graphs.at_first_use = True
    plain = PaddedFlow(flow32)

    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}")
    print("chunk  requests  frames  bucket ms  encoder  TFLOP/s  error")
    for name, tokens, streaming, finalize in (("first", 41, True, False), ("whole", 125, False, True)):
        for count in map(int, args.batches.split(",")):
            items = [item(seed, tokens, streaming, finalize) for seed in range(count)]
            frames = sum(packed.frames(one) for one in items)
            started = time.perf_counter()
            mels = packed(items)
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            ms = milliseconds(partial(packed, items))
            spans = [packed._span(one) for one in items]
            encoder_ms = milliseconds(partial(packed._encode, spans, 0))
            gflop = family.work.of(frames, frames // count)
            error = None
            if count <= 4:
                expected = torch.cat(plain(items))
                error = ((torch.cat(mels) - expected).norm() / expected.norm()).item()
            rows.append(
                {
                    "chunk": name,
                    "requests": count,
                    "frames": frames,
                    "ms": ms,
                    "encoder_ms": encoder_ms,
                    "first_call_ms": 1e3 * first,
                    "tflops": gflop / ms,
                    "error": error,
                }
            )
            shown = "-" if error is None else f"{error:.1e}"
            times = f"{ms:9.2f}  {encoder_ms:7.2f}"
            print(f"{name}  {count:8}  {frames:6}  {times}  {gflop / ms:7.1f}  {shown}", flush=True)
    if args.memory:
        half_flow = copy.deepcopy(flow32).to(dtype)
        memory = remember(half_flow, parts[0], args.memory << 20)
        remembering = PackedFlow(half_flow, *parts, 32, memory)
        remembering.graphs.at_first_use = True
        for count in map(int, args.batches.split(",")):
            compare(packed, remembering, count)
    half = PaddedFlow(copy.deepcopy(flow32).to(dtype))
    for name, tokens, streaming, finalize in (("first", 41, True, False), ("whole", 125, False, True)):
        items = [item(0, tokens, streaming, finalize)]
        half(items)
        ms = milliseconds(partial(half, items))
        print(f"plain PyTorch, {args.dtype}, {name}, 1 request: {ms:.1f} ms")
    if args.profile:
        for tokens, streaming, finalize, count in ((41, True, False, 1), (125, False, True, 16)):
            items = [item(seed, tokens, streaming, finalize) for seed in range(count)]
            profile(flow32.to(dtype), parts, items)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


def compare(plain: PackedFlow, remembering: PackedFlow, count: int, rounds: int = 5) -> None:
    """Compare chunks of `count` streams with known voices, without and with cached state: print medians of
    `rounds` streams and the largest relative difference."""
    voices = [item(seed, 125, True, True) for seed in range(count)]
    times: dict[str, list[list[float]]] = {}
    difference = 0.0
    for _ in range(rounds + 1):  # the first round caches the voices
        streams = [replace(voice, stream_memo=Memo()) for voice in voices]
        for name, end in (("first", 41), ("second", 66), ("third", 91), ("last", 125)):
            chunk = [replace(one, tokens=one.tokens[:end], finalize=end == 125) for one in streams]
            found = []
            for model in (plain, remembering):
                start = time.perf_counter()
                found.append(torch.cat(model(chunk)))
                torch.cuda.synchronize()
                times.setdefault(name, [[], []])[len(found) - 1].append(1e3 * (time.perf_counter() - start))
            without, with_memory = found
            difference = max(difference, ((with_memory - without).norm() / without.norm()).item())
    for name, pair in times.items():
        before, after = (statistics.median(each[1:]) for each in pair)
        print(f"{name} chunk, known voice, {count} requests: {before:.2f} ms, with a memory {after:.2f} ms")
    print(f"largest relative difference: {difference:.1e}", flush=True)


def profile(flow: BaseFlow, parts: tuple[StepEstimator[Any], TableEncoder], items: list[FlowItem]) -> None:
    """flow: in the type of its parts"""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    packed = PackedFlow(flow, *parts, items=32, graphs=False)
    packed(items)
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        packed(items)
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=40))


if __name__ == "__main__":
    main()
