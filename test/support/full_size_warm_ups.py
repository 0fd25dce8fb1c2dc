"""Compiles for an H100 all Triton kernels that the models rehearse at the start, in the sizes of
CosyVoice2-0.5B (flow and vocoder also in those of Fun-CosyVoice3-0.5B) and with the configurations measured
on one GPU, given by the path of their file; prints as JSON how often each kernel was compiled. As
rehearsals.py, a part of test_compile_ahead.py. Takes minutes."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections import Counter
from pathlib import Path

import bench_flow
import bench_hift
import bench_llm
import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.common import cuda_graphs
from light_tts.engine.llm import triton_runner
from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.options import EngineOptions
from light_tts.kernels import configs
from light_tts.models.flow import packed as packed_flow
from light_tts.models.vocoder.causal_network import CausalNetwork
from light_tts.models.vocoder.causal_runner import CausalRunner
from light_tts.models.vocoder.network import HiftNetwork
from light_tts.models.vocoder.runner import HiftRunner
from support.fake_gpu import FakeGpu
from support.warm_ups import CPU, Graph, rehearse_for_gpu

ITEMS = 16
LENGTH, ROWS = 1024, 128


def empty_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In place of a matrix product, whose result nobody reads here."""
    return x.new_empty(*x.shape[:-1], len(weight))


def main() -> None:
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(message)s")
    gpu, measured = FakeGpu(), json.loads(Path(sys.argv[1]).read_text())
    configs.load = lambda device: measured
    cuda_graphs.capture = lambda function, pool: (Graph(), None)
    F.linear = empty_linear
    rehearse_for_gpu(ended=lambda: None)
    for family in bench_flow.FAMILIES.values():
        flow = family.full_size("cpu")
        parts = family.pack(flow, torch.float16)
        packed_flow.PackedFlow(flow.half(), *parts, ITEMS).warm_up(ITEMS)
    hift = HiftNetwork(bench_hift.full_size(CPU))
    HiftRunner(hift, bench_hift.CACHED).warm_up(ITEMS)
    CausalRunner(CausalNetwork(bench_hift.full_size_causal(CPU))).warm_up(ITEMS)
    bench_llm.SIZES = {"full": dataclasses.replace(bench_llm.SIZES["full"], num_hidden_layers=1)}
    model = bench_llm.random_model("full", CPU).half()
    for int8 in (False, True):
        options = EngineOptions(
            slots=LENGTH, rows=ROWS, max_len=LENGTH, int8=int8, graph_max_batch=ROWS, graph_max_len=LENGTH
        )
        LLMEngine(model, options, triton_runner.TritonRunner).warm_up()
    print(json.dumps(Counter(gpu.compiled)))


if __name__ == "__main__":
    main()
