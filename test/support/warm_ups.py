"""The warm-ups of the tiny checkpoint's models on a fake GPU that compiles nothing; prints as JSON which
kernels each of them asked for in its rehearsal and afterwards. As rehearsals.py, a part of
test_compile_ahead.py."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from light_tts.engine.llm import triton_runner
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.models.flow import packed as packed_flow
from light_tts.models.flow.flow import Flow
from light_tts.models.vocoder import runner as hift_runner
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.network import HiftNetwork
from light_tts.tools.parity.llm import load_engine
from support.fake_gpu import FakeGpu
from support.llm_requests import GOLDEN

CPU = torch.device("cpu")
ITEMS = 3
BATCHES = {"rows": 24, "graph_max_batch": 24, "graph_max_len": 1024}


class Graphs:
    """In place of a GraphCache: records nothing."""

    enabled = True

    def __contains__(self, key: object) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def run(self, key: object, function: Callable[[], object]) -> object:
        return function()

    record = run

    def clear(self) -> None:
        pass


def main() -> None:
    gpu, found = FakeGpu(compiles=False), {}

    def rehearsed(device: torch.device, rehearse: Callable[[], None]) -> None:
        assert device == CPU
        compile_ahead(torch.device("cuda", 0), rehearse)
        found.setdefault("rehearsals", []).append(gpu.counted())

    for module in (packed_flow, hift_runner, triton_runner):
        module.compile_ahead = rehearsed

    flow = Flow.from_checkpoint(GOLDEN.checkpoint, GOLDEN.config, CPU)
    packed = packed_flow.PackedFlow(flow, packed_flow.pack(flow, torch.float16), ITEMS)
    packed._graphs = Graphs()
    hift = Hift.from_checkpoint(GOLDEN.checkpoint, GOLDEN.config, CPU)
    vocoder = hift_runner.HiftRunner(HiftNetwork(hift), cached_samples=480)
    llm = load_engine(GOLDEN, runner=triton_runner.TritonRunner, slots=1024, **BATCHES)
    llm._runner._graphs = Graphs()
    for warm_up in (lambda: packed.warm_up(ITEMS), lambda: vocoder.warm_up(ITEMS), llm.warm_up):
        warm_up()
        found.setdefault("afterwards", []).append(gpu.counted())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
