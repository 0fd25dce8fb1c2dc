"""Which sizes are recorded as CUDA graphs and when. On a CPU a stand-in is recorded, which runs the function
again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.stand_in_graph import StandInGraph

from light_tts.common import cuda_graphs
from light_tts.common.cuda_graphs import GraphCache, SizedWork

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")


class Recorder:
    """Stands in for `capture` and notes the sizes."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.fails: set[int] = set()

    def __call__(self, function: Any, pool: Callable[[], Any]) -> tuple[StandInGraph, torch.Tensor]:
        result = function()
        if len(result) in self.fails:
            raise RuntimeError("cannot be recorded")
        self.order.append(len(result))
        return StandInGraph(function, result), result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "capture", recorder)
    monkeypatch.setattr(GraphCache, "_last_recorded_in_use", -GraphCache.PAUSE)
    return recorder


def work_of(size: int) -> SizedWork:
    inputs = torch.zeros(size)
    return SizedWork(lambda: inputs * 2, inputs.zero_, inputs)


def cache(*planned: int) -> GraphCache:
    cache = GraphCache(torch.device("cuda", 0))
    for size in planned:
        cache.plan(size, partial(work_of, size))
    return cache


def use(cache: GraphCache, size: int) -> None:
    """Run a size once and check the result."""
    work = cache.use(size, partial(work_of, size))
    given = torch.arange(size, dtype=torch.float32)
    work.inputs.copy_(given)
    assert torch.equal(work.run(), given * 2)


def test_a_size_runs_without_a_graph_until_it_is_recorded_and_with_the_same_result(recorder):
    graphs = cache(3)
    use(graphs, 3)
    assert recorder.order == [] and len(graphs) == 0 and graphs.unrecorded == 1
    assert graphs.record_next()
    assert recorder.order == [3] and len(graphs) == 1 and graphs.unrecorded == 0
    use(graphs, 3)
    assert not graphs.record_next()


def test_sizes_are_recorded_by_uses_then_in_the_order_planned(recorder):
    graphs = cache(1, 2, 3, 4)
    graphs.record(4)  # first of all, for its memory
    for size in (3, 2, 3, 7):
        use(graphs, size)
    while graphs.record_next():
        pass
    assert recorder.order == [4, 3, 2, 7, 1]


def test_a_busy_server_records_what_it_uses_often_one_size_in_a_while(recorder, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cuda_graphs.time, "monotonic", lambda: now[0])
    graphs, others = cache(5, 6), cache(8)
    for _ in range(GraphCache.USES):
        for size in (5, 6):
            use(graphs, size)
        use(others, 8)
    assert recorder.order == []
    for size in (5, 6):
        use(graphs, size)
    use(others, 8)
    assert recorder.order == [5]
    now[0] += GraphCache.PAUSE / 2
    use(graphs, 6)
    assert recorder.order == [5]
    now[0] += GraphCache.PAUSE / 2
    use(graphs, 6)
    use(others, 8)
    assert recorder.order == [5, 6]


def test_a_size_that_cannot_be_recorded_is_logged_once_and_runs_without_a_graph(recorder, caplog):
    graphs = cache(2, 3)
    recorder.fails.add(2)
    with caplog.at_level(logging.WARNING):
        while graphs.record_next():
            pass
    assert "size 2 runs without a CUDA graph, which cannot be recorded: cannot be recorded" in caplog.text
    assert recorder.order == [3] and graphs.unrecorded == 0
    for _ in range(GraphCache.USES + 2):
        use(graphs, 2)
    assert recorder.order == [3] and len(caplog.records) == 1


def test_the_least_recently_used_size_is_dropped(recorder, monkeypatch):
    monkeypatch.setattr(GraphCache, "LIMIT", 3)
    graphs = cache(1, 2)
    while graphs.record_next():
        pass
    use(graphs, 1)
    for size in (3, 4):
        use(graphs, size)
    assert len(graphs) == 1 and graphs.unrecorded == 2
    while graphs.record_next():
        pass
    assert len(graphs) == 3
    use(graphs, 2)  # it was dropped
    assert recorder.order == [1, 2, 3, 4] and graphs.unrecorded == 1


def test_at_first_use_means_at_once(recorder):
    graphs = cache()
    graphs.at_first_use = True
    for size in (2, 3, 2):
        use(graphs, size)
    assert recorder.order == [2, 3]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_graphs_nothing_is_kept(recorder, device):
    graphs = GraphCache(torch.device(device), enabled=device == "cpu")
    graphs.plan(2, partial(work_of, 2))
    use(graphs, 2)
    assert not graphs.record_next() and len(graphs) == graphs.unrecorded == 0


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_failed_recording_leaves_the_work_and_other_sizes_intact(caplog):
    inputs = torch.zeros(4, device="cuda")

    def synchronizes() -> torch.Tensor:
        result = inputs * 2
        torch.cuda.current_stream().synchronize()  # not allowed while recording
        return result

    with torch.cuda.stream(torch.cuda.Stream()):
        graphs = GraphCache(torch.device("cuda"))
        graphs.plan("wrong", lambda: SizedWork(synchronizes, inputs.zero_, inputs))
        graphs.plan("right", lambda: SizedWork(lambda: inputs + 1, inputs.zero_, inputs))
        while graphs.record_next():
            pass
        assert "size wrong runs without a CUDA graph" in caplog.text
        assert len(graphs) == 1
        inputs.fill_(3)
        for _ in range(2):
            assert graphs.use("wrong", lambda: None).run().tolist() == [6] * 4
            assert graphs.use("right", lambda: None).run().tolist() == [4] * 4


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_dropped_graphs_give_their_memory_to_the_next(monkeypatch):
    monkeypatch.setattr(GraphCache, "LIMIT", 4)
    inputs = torch.zeros(1 << 22, device="cuda")
    reserved = []
    with torch.cuda.stream(torch.cuda.Stream()):
        graphs = GraphCache(torch.device("cuda"))
        graphs.at_first_use = True
        for size in range(60):
            make = partial(SizedWork, lambda size=size: inputs + size)
            assert int(graphs.use(size, make).run()[-1]) == size
            reserved.append(torch.cuda.memory_reserved())
    assert len(graphs) == 4
    assert reserved[-1] <= reserved[10] + inputs.nbytes
