"""Speed of the language model alone: random weights of CosyVoice2-0.5B's sizes, real engine and scheduler.

python scripts/bench_llm.py                            batches 1, 8, 32, 64, 128; KV cache in float16
python scripts/bench_llm.py --int8                     KV cache in int8
python scripts/bench_llm.py --profile --batches 1 64   the kernels of one round, without CUDA graphs
python scripts/bench_llm.py --linear triton cuda       one after the other: the kernels of the linear layers
python scripts/bench_llm.py --stub                     no model: only the host's work in a round

Lengths are those of the preset short5s of test/benchmark.py: 20 tokens of text, a prompt of 3.5 s, 5 s of
speech. The lower bound of a step is the time to read all weights and the KV cache once at --bandwidth.

--linear: triton; cuda (tensor_linear.cu, up to 64 rows); "cuda 896x4864=2,4,5,1": with this OUTPUT_TILES,
SPLITS, PAIRS, STAGED for layers of 896 outputs (gated: gates) and 4864 inputs; or what replaces the lists of
kernels/configs/, as JSON: '{"tensor_linear": [{"rows": 64}], "decode_attention": [...]}'. By default what was
measured is used.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from light_tts.common.sampling_rule import SamplingRule
from light_tts.common.transfer import Download
from light_tts.engine.llm.attention import RowSpan
from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.options import EngineOptions
from light_tts.engine.llm.scheduler import Limits, Scheduler
from light_tts.engine.llm.sequence import PartRequest
from light_tts.models.checkpoint.config import LLMConfig
from light_tts.models.checkpoint.cosyvoice2_config import COSYVOICE2_IDS
from light_tts.models.llm.speech_lm import Qwen2Config, SpeechLM
from light_tts.tools.tiny_checkpoint import SIZES

SAMPLING = SamplingRule(top_p=0.8, top_k=25, win_size=10, tau_r=0.1)
TEXT = 50  # text tokens of the prompt


@dataclass
class Result:
    batch: int
    ms_a_step: float
    tokens_a_second: float
    floor_ms: float
    share_of_floor: float
    host_ms_a_round: float
    prefill_ms: float


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--prompt", type=int, default=125, help="tokens before the first output")
    parser.add_argument("--output", type=int, default=125, help="tokens that each request speaks")
    parser.add_argument("--round_steps", type=int, default=8)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--int8", action="store_true", help="KV cache in int8")
    parser.add_argument("--disable_cudagraph", action="store_true")
    parser.add_argument("--overlap", choices=("on", "off"), help="of kernels; default: as measured")
    parser.add_argument("--linear", nargs="+", default=["measured"], help="see above")
    parser.add_argument(
        "--steps_only", action="store_true", help="prefills of several requests are not recorded as graphs"
    )
    parser.add_argument("--bandwidth", type=float, default=3.0, help="of the GPU's memory, TB/s")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one round")
    parser.add_argument("--stub", action="store_true", help="nothing is computed")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser


def main() -> None:
    args = parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.stub else "cpu")
    if args.overlap:
        from light_tts.kernels import overlap  # only available with Triton

        overlap.enabled = lambda *_: args.overlap == "on"
    results = []
    for linear in args.linear:
        if linear != "measured":
            choose_linear(device, linear)
            print(f"linear layers: {linear}")
        results += bench(device, linear, args)
    if args.json:
        args.json.write_text(json.dumps({"int8": args.int8, "results": results}, indent=1))


def choose_linear(device: torch.device, linear: str) -> None:
    """Use these kernels for the linear layers of the engines made from now on."""
    from light_tts.kernels import configs  # only available with Triton
    from light_tts.kernels.llm import decode_attention, tensor_linear

    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # as that of tensors
    if linear.startswith("{"):
        entries = json.loads(linear)
    else:
        name, *layers = linear.split()
        known = [{"rows": tensor_linear.MAX_ROWS}] if name == "cuda" else []
        entries = {"tensor_linear": known + [entry_of(layer) for layer in layers]}
    configs.load.cache_clear()
    configs.load(device).update(entries)
    tensor_linear.linear_config.cache_clear()
    decode_attention.decode_config.cache_clear()
    if entries.get("tensor_linear") and not tensor_linear.measured_rows(device, torch.float16):
        raise SystemExit("tensor_linear.cu cannot be used on this device")


def entry_of(layer: str) -> dict[str, int]:
    """Return an entry of "tensor_linear" for all numbers of rows: of the form "896x4864=2,4,5,1"."""
    size, _, values = layer.partition("=")
    outputs, inputs = map(int, size.split("x"))
    names = ("OUTPUT_TILES", "SPLITS", "PAIRS", "STAGED")
    config = dict(zip(names, map(int, values.split(",")), strict=True))
    return {"rows": 64, "outputs": outputs, "inputs": inputs, **config}


def bench(device: torch.device, linear: str, args: argparse.Namespace) -> list[dict]:
    """Print and return the results of each batch size."""
    torch.manual_seed(0)
    model = random_model(args.size, device)
    engine = make_engine(model, args)
    print("batch  ms/step  tokens/s  floor ms  of floor  host ms  prefill")
    results = []
    for batch in args.batches:
        if args.profile:
            profile(engine, model, batch, args)
            continue
        # compiles the remaining kernels
        measure(engine, model, batch, args, min(args.output, 3 * args.round_steps))
        result = measure(engine, model, batch, args, args.output)
        print(
            f"{result.batch:5} {result.ms_a_step:8.3f} {result.tokens_a_second:9.0f} {result.floor_ms:9.3f} "
            f"{result.share_of_floor:9.0%} {result.host_ms_a_round:8.2f}  {result.prefill_ms:.1f} ms",
            flush=True,
        )
        results.append({"linear": linear, **asdict(result)})
    return results


def random_model(size: str, device: torch.device) -> SpeechLM:
    sizes = SIZES[size]
    backbone = Qwen2Config(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    config = LLMConfig(
        sizes.hidden_size, sizes.hidden_size, sizes.speech_token_size, (5, 15), SAMPLING, COSYVOICE2_IDS
    )
    with torch.device("meta"):
        model = SpeechLM(backbone, config).to(torch.float16 if device.type == "cuda" else torch.float32)
    model = model.to_empty(device=device).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    model.llm_decoder.bias[model.ids.speech_tokens :] = -100.0  # no request ends before its intended length
    return model.merge_embeddings().eval()


class StubRunner:
    """Always samples the same token and computes nothing."""

    graphs = None

    def __init__(self, *_: object) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def prefill(
        self, ids: list[int], spans: list[RowSpan], complete: list[int], records: np.ndarray
    ) -> Tensor:
        return torch.ones(1, len(complete), dtype=torch.int32)

    def decode(self, spans: list[RowSpan]) -> Tensor:
        return torch.ones(max(span.length for span in spans), len(spans), dtype=torch.int32)


def make_engine(model: SpeechLM, args: argparse.Namespace) -> LLMEngine:
    length, rows = args.prompt + args.output, max(args.batches)
    graphs = not (args.disable_cudagraph or args.profile)
    options = EngineOptions(
        slots=length * rows,
        rows=rows,
        max_len=length,
        int8=args.int8,
        round_steps=args.round_steps,
        graph_max_batch=rows if graphs else 0,
        graph_max_len=length,
    )
    engine = LLMEngine(model, options, StubRunner if args.stub else None)
    started = time.perf_counter()
    engine.warm_up()
    while engine.unrecorded and not args.steps_only:
        engine.record_next()
    engine.synchronize()
    print(f"warm-up {time.perf_counter() - started:.1f} s", flush=True)
    return engine


class Loop:
    """Drives engine and scheduler like the LLM stage, one round ahead."""

    def __init__(
        self, engine: LLMEngine, model: SpeechLM, batch: int, prompt: int, output: int, steps: int
    ) -> None:
        self._engine = engine
        self._scheduler = Scheduler(
            Limits(
                slots=batch * (prompt + output),
                prefill_tokens=batch * prompt,
                prefill_requests=batch,
                running=batch,
                alive=batch,
                steps_between_admissions=steps,
                busy_ratio=0.0,
                assumed_output=output,
                round_steps=steps,
            )
        )
        for i in range(batch):
            part = PartRequest(
                job=str(i),
                part=0,
                seed=i,
                ids=model.ids,
                limit=prompt + output,
                prompt_speech=[(11 * i + j) % 500 for j in range(prompt - TEXT - 2)],
                min_outputs=output,
                max_outputs=output,
                sampling=SAMPLING,
            )
            self._scheduler.submit(OneShot(part, [(7 * i + j) % 500 for j in range(TEXT)]))
        self.steps = self.rounds = 0

    def prefill(self) -> None:
        while any(not s.on_device for s in self._scheduler.running) or self._scheduler.waiting:
            self._begin()
        while self._engine.in_flight:
            self._collect()

    def decode(self) -> None:
        while self._scheduler.has_work or self._engine.in_flight:
            self.round()

    def round(self) -> None:
        if not self._begin() and self._engine.in_flight:
            self._collect()
        while self._engine.in_flight > 1:
            self._collect()

    def _begin(self) -> bool:
        self._scheduler.admit()
        work = self._scheduler.plan().work
        if work:
            self._engine.launch(work)
            self.rounds += 1
        return bool(work)

    def _collect(self) -> None:
        taken, steps = self._engine.collect()
        self.steps += steps
        for sequence, _ in taken:
            if sequence.finished:
                self._scheduler.end(sequence)
                self._engine.release(sequence)


class Waiting:
    """Measures the seconds that the host waits for results."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Waiting:
        self._wait = wait = Download.wait

        def timed(download: Download) -> Tensor:
            started = time.perf_counter()
            result = wait(download)
            self.seconds += time.perf_counter() - started
            return result

        Download.wait = timed
        return self

    def __exit__(self, *_: object) -> None:
        Download.wait = self._wait


def measure(engine: LLMEngine, model: SpeechLM, batch: int, args: argparse.Namespace, output: int) -> Result:
    loop = Loop(engine, model, batch, args.prompt, output, args.round_steps)
    engine.synchronize()
    begun = time.perf_counter()
    loop.prefill()
    prefilled = time.perf_counter()
    loop.steps = loop.rounds = 0
    with Waiting() as waiting:
        loop.decode()
    seconds = time.perf_counter() - prefilled
    floor = floor_ms(model, batch, args.prompt + output / 2, args)
    ms = 1000 * seconds / loop.steps
    return Result(
        batch=batch,
        ms_a_step=ms,
        tokens_a_second=batch * loop.steps / seconds,
        floor_ms=floor,
        share_of_floor=floor / ms,
        host_ms_a_round=1000 * (seconds - waiting.seconds) / loop.rounds,
        prefill_ms=1000 * (prefilled - begun),
    )


def floor_ms(model: SpeechLM, batch: int, length: float, args: argparse.Namespace) -> float:
    weights = sum(
        p.numel() * p.element_size() for name, p in model.named_parameters() if name != "embedding.weight"
    )
    backbone = model.backbone
    element = model.embedding.weight.element_size()
    head = backbone.head_dim + element if args.int8 else backbone.head_dim * element
    kv = 2 * backbone.num_hidden_layers * backbone.num_key_value_heads * head * batch * length
    return (weights + kv) / (args.bandwidth * 1e9)


def profile(engine: LLMEngine, model: SpeechLM, batch: int, args: argparse.Namespace) -> None:
    for profiled in (False, True):
        loop = Loop(engine, model, batch, args.prompt, args.output, args.round_steps)
        loop.prefill()
        if profiled:
            with torch.profiler.profile() as trace:
                loop.round()
                engine.synchronize()
            sort_by = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
            print(f"batch {batch}, one round of {args.round_steps} steps")
            print(trace.key_averages().table(sort_by=sort_by, row_limit=15, max_name_column_width=60))
        loop.decode()


if __name__ == "__main__":
    main()
