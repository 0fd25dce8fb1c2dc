"""Speed and error of the vocoder at full size with random weights, on the GPU.

python scripts/bench_hift.py                  a first chunk of one item, and batches of long ones
python scripts/bench_hift.py --json FILE      the same, with the figures written to a file
python scripts/bench_hift.py --profile        instead, every kernel of a first chunk in its order
python scripts/bench_hift.py --family cosyvoice3 [...]   that of CosyVoice3: first and later chunks

Compares plain PyTorch in float32, the same with TF32 in one CUDA graph (CosyVoice2 only), and the kernels.
`error` is the level of the difference from the float32 waveform (CosyVoice2: for the same source), relative
to the level of that waveform.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from light_tts.common.cuda_graphs import GraphCache, SizedWork
from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.vocoder.backend import choose_causal_vocoder, choose_vocoder
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.causal_stream import TorchCausalVocoder
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.interface import CausalItem, CausalVocoder, MelBatch, SourceNoise, Vocoder
from light_tts.models.vocoder.plain import TorchVocoder
from light_tts.tools.random_weights import RandomWeights, hift_state
from light_tts.tools.tiny_checkpoint import SIZES
from light_tts.tools.tiny_cosyvoice3 import SIZES as SIZES3

GOLDEN = Path(__file__).resolve().parent.parent / "test" / "golden"
CACHED = 3840
BATCHES = ((1, 76), (1, 250), (4, 250), (8, 250), (16, 250), (32, 250))
ITEMS = (1, 4, 16)  # of CosyVoice3
FIRST, LATER = 76, 50  # mel frames of its chunks

AnyHift = TypeVar("AnyHift", bound=nn.Module)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=["cosyvoice2", "cosyvoice3"], default="cosyvoice2")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a first chunk instead")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), flush=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        run = bench if args.family == "cosyvoice2" else bench_causal
        rows = run(device, args.profile, args.seconds)
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


def bench(device: torch.device, profiled: bool, seconds: float) -> list[dict[str, object]]:
    """Return what `measure` returns for each size."""
    hift = full_size(device)
    vocoder = choose_vocoder(hift, CACHED)()
    if profiled:
        profile(vocoder, batch_of(hift.config.in_channels, *BATCHES[0], device))
        return []
    flops = flops_of_frame(hift)
    print(f"{flops * 50 / 1e9:.1f} GFLOP for a second of audio", flush=True)
    return [row for size in BATCHES for row in measure(hift, vocoder, *size, flops, seconds)]


def bench_causal(device: torch.device, profiled: bool, seconds: float) -> list[dict[str, object]]:
    """Return what `measure_causal` returns for each size."""
    hift = full_size_causal(device)
    vocoder = choose_causal_vocoder(hift)()
    if profiled:
        profile(vocoder, chunks_of(hift, 1, FIRST))
        return []
    plain, rows = TorchCausalVocoder(hift, batched=True), []
    for items in ITEMS:
        first = chunks_of(hift, items, FIRST)
        rows += measure_causal(plain, vocoder, f"{items:3} first chunks of {FIRST}", first, seconds)
        later = [
            dataclasses.replace(item, state=state)
            for item, (_, state) in zip(chunks_of(hift, items, LATER), plain.speak(first), strict=True)
        ]
        rows += measure_causal(plain, vocoder, f"{items:3} later chunks of {LATER}", later, seconds)
    return rows


def full_size(device: torch.device) -> Hift:
    """Return the vocoder in the sizes of CosyVoice2-0.5B with random weights."""
    sizes, config = SIZES["full"], load_config(GOLDEN / "cosyvoice2" / "checkpoint").hift
    config = dataclasses.replace(
        config, base_channels=sizes.hift_channels, f0_cond_channels=sizes.f0_channels
    )
    with torch.device("meta"):
        hift = Hift(config)
    return with_random_weights(hift).float().to(device)


def full_size_causal(device: torch.device) -> CausalHift:
    """Return the vocoder in the sizes of Fun-CosyVoice3-0.5B with random weights."""
    sizes, config = SIZES3["full"], load_config3(GOLDEN / "cosyvoice3" / "checkpoint").hift
    config = dataclasses.replace(
        config, base_channels=sizes.hift_channels, f0_cond_channels=sizes.f0_channels
    )
    with torch.device("meta"):
        hift = CausalHift(config)
    hift = with_random_weights(hift).float()
    hift.f0_predictor.double()
    return hift.to(device)


def with_random_weights(hift: AnyHift) -> AnyHift:
    """Return the module, which is on the meta device, on the CPU without weight norm."""
    hift.load_state_dict(hift_state(RandomWeights(0).like(hift)), assign=True)
    for module in list(hift.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return hift.eval().requires_grad_(False)


def flops_of_frame(hift: Hift) -> float:
    """Return the operations of the convolutions per mel frame."""
    device, frames = hift.conv_pre.weight.device, 50
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mel = torch.zeros(1, hift.config.in_channels, frames, device=device)
        hift.f0(mel, [frames])
        hift.decode(mel, torch.zeros(1, frames * hift.samples_per_frame, device=device), [frames])
    return counter.get_total_flops() / frames


def measure(
    hift: Hift, vocoder: Vocoder, batch: int, frames: int, flops: float, seconds: float
) -> list[dict[str, object]]:
    """Return one line per implementation for a batch."""
    device = hift.conv_pre.weight.device
    mels = batch_of(hift.config.in_channels, batch, frames, device)
    mel, lengths = mels.mel, list(mels.lengths)
    plain = TorchVocoder(hift)
    noise = torch.randn(batch, frames * hift.samples_per_frame, hift.m_source.waves, device=device)
    on_device = torch.tensor(lengths, device=device)
    graphs = GraphCache(device)
    graphs.at_first_use = vocoder.graphs.at_first_use = True

    def recorded() -> tuple[Tensor, Tensor]:
        make = partial(SizedWork, lambda: hift.inference(mel, on_device, None, noise))
        return graphs.use("plain", make).run()

    ways: dict[str, tuple[bool, Callable[[], tuple[Tensor, Tensor]]]] = {
        "plain": (False, lambda: plain.speak(mels)),
        "plain, TF32, graph (noise given)": (True, recorded),
        "kernels": (False, lambda: vocoder.speak(mels)),
    }
    rows = []
    for name, (tf32, speak) in ways.items():
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        started = time.perf_counter()
        wave, source = speak()
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        wave, source = wave.clone(), source.clone()
        each = time_of(speak, seconds)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        expected = hift.decode(mel, source, lengths)
        error = float((wave - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        rows.append(
            {
                "batch": batch,
                "frames": frames,
                "way": name,
                "ms": each * 1e3,
                "tflops": flops * batch * frames / each / 1e12,
                "error": error,
                "first_s": first,
            }
        )
        print(
            f"{batch:3} x {frames:3} frames  {name:34} {each * 1e3:8.2f} ms {rows[-1]['tflops']:7.1f} TFLOP/s"
            f"  error {error:.1e}  first call {first:5.1f} s",
            flush=True,
        )
    return rows


def measure_causal(
    plain: CausalVocoder, kernels: CausalVocoder, name: str, items: list[CausalItem], seconds: float
) -> list[dict[str, object]]:
    """Return one line per implementation for a batch of chunks."""
    if kernels.graphs is not None:
        kernels.graphs.at_first_use = True
    rows: list[dict[str, object]] = []
    expected = None
    for way, vocoder in (("plain", plain), ("kernels", kernels)):
        wave = torch.cat([wave for wave, _ in vocoder.speak(items)])
        each = time_of(partial(vocoder.speak, items), seconds)
        expected = wave if expected is None else expected
        error = float((wave - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        rows.append({"chunks": name, "way": way, "ms": each * 1e3, "error": error})
        print(f"{name}  {way:8} {each * 1e3:8.2f} ms  error {error:.1e}", flush=True)
    return rows


def chunks_of(hift: CausalHift, items: int, frames: int) -> list[CausalItem]:
    """Return random first chunks of the same length."""
    mels = batch_of(hift.config.in_channels, items, frames, hift.conv_pre.weight.device)
    return [CausalItem(mel, None, False, noise) for mel, noise in zip(mels.mel, mels.noises, strict=True)]


def batch_of(channels: int, items: int, frames: int, device: torch.device) -> MelBatch:
    """Return random items of the same length, which all continue a stream."""
    random = torch.Generator().manual_seed(items)
    mel = (torch.randn(items, channels, frames, generator=random) * 1.5 - 5).to(device)
    cached = [torch.zeros(CACHED, device=device)] * items
    return MelBatch(mel, [frames] * items, cached, [SourceNoise(seed, 0, 0) for seed in range(items)])


def profile(vocoder: Any, mels: MelBatch | list[CausalItem]) -> None:
    """Print the time of every kernel in a CUDA graph of the batch, the median of some runs, and their sum."""
    vocoder.graphs.at_first_use = True
    for _ in range(3):  # without a graph, recorded, replayed
        vocoder.speak(mels)
    runs = []
    for _ in range(9):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            vocoder.speak(mels)
            torch.cuda.synchronize()
        kernels = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
        runs.append(sorted(kernels, key=lambda event: event.time_range.start))
    most, total = max(map(len, runs)), 0.0  # events may get lost
    runs = [run for run in runs if len(run) == most]
    for same in zip(*runs, strict=True):
        median = statistics.median(event.time_range.elapsed_us() for event in same)
        total += median
        print(f"{median:8.1f} us  {same[0].name[:80]}")
    spans = [run[-1].time_range.end - run[0].time_range.start for run in runs]
    print(f"{total:8.1f} us  altogether, {most} kernels, in {statistics.median(spans):.1f} us")


def time_of(function: Callable[[], object], seconds: float) -> float:
    """Return the seconds per call, averaged over about `seconds`."""
    function()
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - started < seconds:
        for _ in range(3):
            function()
        count += 3
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    main()
