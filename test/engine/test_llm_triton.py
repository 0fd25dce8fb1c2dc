"""The Triton implementation of the language model against the plain one: on a GPU if available, else in
Triton's interpreter, which is slow, so requests are short."""

import numpy as np
import pytest
import torch
from support.interpreter import GPU
from support.llm_requests import GOLDEN, GOLDEN3, PROMPT, TEXT, Loop, bistream, request

from light_tts.engine.llm.attention import RowSpan
from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.runner import TorchRunner
from light_tts.tools.parity import Golden
from light_tts.tools.parity.llm import finish, golden_ids, greedy_sequence, load_engine, load_model, run

pytest.importorskip("triton")
from light_tts.engine.llm.prefill_batch import PrefillShape
from light_tts.engine.llm.triton_runner import TritonRunner
from light_tts.kernels.llm import row_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAPHS = {"graph_max_batch": 8, "graph_max_len": 1024}
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a program with many outputs as with few (test_llm_kernels.py covers
    small ones)."""
    if not GPU:
        monkeypatch.setattr(row_linear, "row_config", lambda *_: {"BLOCK_OUT": 64, "num_warps": 4})


def triton(golden: Golden = GOLDEN, **options) -> LLMEngine:
    options = {"slots": 1024, **GRAPHS, **options}
    return load_engine(golden, device=DEVICE, runner=TritonRunner, **options)


def loop(ahead: int, round_steps: int, runner: type, device: str = DEVICE, **options) -> Loop:
    options = {"runner": runner, "device": device, "max_len": 1024, **GRAPHS, **options}
    return Loop(ahead, round_steps, slots=2048, prefill_tokens=50, engine=options)


def short(count: int) -> list:
    return [request(i, min_outputs=2, max_outputs=4 + i % 2) for i in range(count)]


SHORT = "zs" if GPU else "noprompt"  # without a prompt there is less to prefill


@pytest.mark.parametrize(
    ("golden", "name", "int8"), [(GOLDEN, SHORT, False), (GOLDEN, SHORT, True), (GOLDEN3, "zs", False)]
)
def test_greedy_tokens_are_the_golden_ones(golden, name, int8):
    """Two steps after the prefill in the interpreter: the second one reads keys that a step has stored."""
    expected = golden_ids(golden.arrays("llm.npz"), f"greedy_{name}")
    sequence = greedy_sequence(golden, name)
    sequence.max_outputs = len(expected) if GPU else 3
    assert finish(triton(golden, int8=int8), sequence) == expected[: sequence.max_outputs]


def test_draws_are_those_of_the_plain_path():
    expected, sequences = short(3), short(3)
    loop(0, 1, TorchRunner, "cpu").run(expected)
    loop(1, 3, TritonRunner).run(sequences)
    assert [s.outputs for s in sequences] == [s.outputs for s in expected]


def test_bistream_draws_are_those_of_the_plain_path():
    outputs = []
    for runner, device in ((TorchRunner, "cpu"), (TritonRunner, DEVICE)):
        sequence = bistream(max_outputs=7, prompt_speech=PROMPT[:26])  # so that text follows soon
        sequence.append_text(TEXT[:6])
        sequence.finish_text()
        loop(1, 8, runner, device).run([sequence])
        outputs.append(sequence.outputs)
    assert outputs[0] == outputs[1] and load_model(GOLDEN).ids.fill in outputs[0]


def test_batches_and_lengths_fall_into_buckets():
    runner = triton(graph_max_batch=100, graph_max_len=900, rows=200, max_len=1024)._runner
    assert [runner._batch_bucket(n) for n in (1, 3, 9, 64, 97, 101, 129)] == [1, 4, 12, 64, 100, 128, 192]
    assert [runner._length_bucket(n) for n in (1, 512, 513, 900, 901)] == [512, 512, 900, 900, 1024]


def test_prefills_are_filled_up_to_sizes_with_a_graph():
    def bucket(tokens: int, spans: int, **options) -> tuple[int, int, bool]:
        shape, recorded = triton(**options)._runner._prefill_bucket(tokens, spans)
        return shape.tokens, shape.spans, recorded

    assert bucket(5, 1) == (16, 1, True)
    assert bucket(200, 3) == (256, 4, True)
    assert bucket(3000, 3) == (3000, 3, False)
    assert bucket(5, 1, graph_max_batch=0) == (5, 1, False)


def test_lists_of_a_prefill_begin_where_kernels_expect_them():
    spans = [RowSpan(3, 0, 70), RowSpan(1, 5, 2)]
    shape = PrefillShape(tokens=100, spans=5, words=3)
    records = np.array([[7, 8, 9]], np.int32)
    flat = shape.pack(list(range(72)), spans, [1], records, lambda row: np.arange(100) + 1000 * row)
    assert all(place.start % 4 == 0 for place in shape.places().values())
    batch = shape.unpack(torch.from_numpy(flat))
    assert batch.ids[:72].tolist() == list(range(72))
    assert batch.positions[:72].tolist() == [*range(70), 5, 6]
    assert batch.slots[69:73].tolist() == [3069, 1005, 1006, -1]
    assert batch.offsets[:2].tolist() == [0, 70] and batch.lengths.tolist() == [70, 2, 0, 0, 0]
    assert batch.last[0] == 71 and batch.draws.tolist() == [1, -1, -1, -1, -1]
    assert batch.records[0].tolist() == [7, 8, 9] and batch.records.shape == (5, 3)
    assert batch.blocks[:4].tolist() == [[0, 0], [0, 64], [1, 0], [-1, -1]]


@gpu
@needs_gpu
def test_whole_requests_on_a_gpu_say_what_the_cpu_says():
    expected, sequences = [request(i) for i in range(6)], [request(i) for i in range(6)]
    loop(0, 1, TorchRunner, "cpu").run(expected)
    loop(1, 8, TritonRunner).run(sequences)
    assert [s.outputs for s in sequences] == [s.outputs for s in expected]


@gpu
@needs_gpu
@pytest.mark.parametrize("int8", [False, True])
def test_graphs_change_nothing(int8):
    """No graphs; few sizes; hardly any recorded yet; each recorded when it is used; all recorded before."""
    outputs = []
    for graph_max_batch, recorded in ((0, ""), (2, "used"), (8, ""), (8, "used"), (8, "all")):
        sequences = [request(i) for i in range(6)]
        made = loop(1, 8, TritonRunner, graph_max_batch=graph_max_batch, int8=int8)
        graphs = made.engine._runner.graphs
        graphs.at_first_use = recorded == "used"
        if recorded == "all":
            made.engine.warm_up()
            while made.engine.unrecorded:
                made.engine.record_next()
        made.run(sequences)
        outputs.append([s.outputs for s in sequences])
        assert len(graphs) or not recorded
    assert all(output == outputs[0] for output in outputs)


@gpu
@needs_gpu
def test_recording_between_two_rounds_changes_nothing():
    """In the middle of requests, while slots and rows are in use."""
    expected, sequence = (request(3, min_outputs=40, max_outputs=60) for _ in range(2))
    finish(triton(), expected)
    engine = triton()
    engine.warm_up()
    while not sequence.finished:
        run(engine, sequence)
        if engine.unrecorded:
            engine.record_next()
    assert sequence.outputs == expected.outputs


@gpu
@needs_gpu
def test_what_is_recorded_beforehand_changes_no_state():
    engine, sequence = triton(), request(3, min_outputs=20, max_outputs=30)
    while len(sequence.outputs) < 10:
        run(engine, sequence)
    engine.warm_up()
    expected = request(3, min_outputs=20, max_outputs=30)
    assert finish(engine, sequence) == finish(triton(), expected)


@gpu
@needs_gpu
def test_without_triton_a_gpu_says_the_same():
    expected, sequences = short(4), short(4)
    loop(0, 1, TorchRunner, "cpu").run(expected)
    loop(1, 8, TorchRunner).run(sequences)
    assert [s.outputs for s in sequences] == [s.outputs for s in expected]
