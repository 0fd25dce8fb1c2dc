"""The warm-ups of the tiny checkpoint's models on a fake GPU that compiles nothing; prints as JSON which
kernels each of them asked for in its rehearsal and afterwards. As rehearsals.py, a part of
test_compile_ahead.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch

from light_tts.common import cuda_graphs
from light_tts.common.cuda_graphs import GraphCache
from light_tts.engine.llm import triton_runner
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.flow import packed as packed_flow
from light_tts.models.vocoder import padded
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.causal_network import CausalNetwork
from light_tts.models.vocoder.causal_runner import CausalRunner
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.network import HiftNetwork
from light_tts.models.vocoder.runner import HiftRunner
from light_tts.tools.parity.llm import load_engine
from support.fake_gpu import FakeGpu
from support.flow_families import FAMILIES, load_flow, pack
from support.llm_requests import GOLDEN

CPU = torch.device("cpu")
ITEMS = 3
BATCHES = {"rows": 24, "graph_max_batch": 24, "graph_max_len": 1024}


class Graph:
    """In place of a CUDA graph: runs nothing."""

    def replay(self) -> None:
        pass


def record_all(model: object) -> None:
    """As the server does in idle moments."""
    while model.graphs.record_next():
        pass


def rehearse_for_gpu(ended: Callable[[], None]) -> None:
    """From now on, models on the CPU rehearse as on a GPU. `ended`: called after each rehearsal."""

    def rehearsed(device: torch.device, rehearse: Callable[[], None]) -> None:
        assert device == CPU
        compile_ahead(torch.device("cuda", 0), rehearse)
        ended()

    for module in (packed_flow, padded, triton_runner):
        module.compile_ahead = rehearsed


def main() -> None:
    gpu, found = FakeGpu(compiles=False), {}
    rehearse_for_gpu(lambda: found.setdefault("rehearsals", []).append(gpu.counted()))
    cuda_graphs.capture = lambda function, pool: (Graph(), function())

    flows = []
    for family in FAMILIES:
        flow = load_flow(family, CPU)
        flows.append(packed_flow.PackedFlow(flow, *pack(flow, torch.float16), ITEMS))
        flows[-1].graphs = GraphCache(torch.device("cuda", 0))
    hift = Hift.from_checkpoint(GOLDEN.checkpoint, GOLDEN.config, CPU)
    vocoder = HiftRunner(HiftNetwork(hift), cached_samples=480)
    vocoder.graphs = GraphCache(torch.device("cuda", 0))
    checkpoint = GOLDEN.checkpoint.parents[1] / "cosyvoice3" / "checkpoint"
    causal_hift = CausalHift.from_checkpoint(checkpoint, load_config3(checkpoint), CPU)
    causal = CausalRunner(CausalNetwork(causal_hift))
    causal.graphs = GraphCache(torch.device("cuda", 0))
    llm = load_engine(GOLDEN, runner=triton_runner.TritonRunner, slots=1024, **BATCHES)
    llm._runner.graphs = GraphCache(torch.device("cuda", 0))
    for warm_up, model in (
        *((partial(flow.warm_up, ITEMS), flow) for flow in flows),
        (lambda: vocoder.warm_up(ITEMS), vocoder),
        (lambda: causal.warm_up(ITEMS), causal),
        (llm.warm_up, llm._runner),
    ):
        warm_up()
        record_all(model)
        found.setdefault("afterwards", []).append(gpu.counted())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
