"""The packed flow against the plain one: the same mel frames, whoever shares the batch. On a machine without
a GPU the references stand in for the kernels, which the interpreter runs too slowly for a whole flow
(test_flow_kernels.py compares them)."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import stand_in_graph
from support.flow_families import FAMILIES, GOLDENS, ONLY_UNET, load_flow, pack
from support.packed_on_cpu import blocks_in_one_kernel, kernels_or_references

from light_tts.common import cuda_graphs
from light_tts.common.cuda_graphs import GraphCache
from light_tts.kernels import overlap
from light_tts.kernels.cuda.kernel import available
from light_tts.kernels.flow.resnet_block import lines_of
from light_tts.models.checkpoint.cosyvoice2_config import EstimatorConfig
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.cfm import euler_steps
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.packed import PackedFlow, _bucket, _buckets
from light_tts.models.flow.packed_rows import Rows
from light_tts.models.flow.padded import PaddedFlow
from light_tts.models.flow.page_store import COPIES
from light_tts.models.flow.unet.estimator import Estimator
from light_tts.models.flow.unet.packed import PackedEstimator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-3  # of the goldens, for a whole flow in float32


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with kernels_or_references(DEVICE):
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def arrays(family: str) -> dict[str, np.ndarray]:
    return GOLDENS[family].arrays("flow.npz")


@pytest.fixture(scope="module")
def flow(family: str) -> BaseFlow:
    return load_flow(family, DEVICE)


@pytest.fixture(scope="module")
def packed(flow) -> PackedFlow:
    return new_packed(flow)


def new_packed(flow: BaseFlow, **options) -> PackedFlow:
    if DEVICE.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    return PackedFlow(flow, *pack(flow, torch.float32), items=8, **options)


@pytest.fixture(scope="module")
def item(arrays: dict[str, np.ndarray]) -> Callable[..., FlowItem]:
    """Return a function that returns an item with the golden tokens and prompt, or parts of them."""

    def new_item(
        tokens: int = 57, prompt: int = 33, streaming: bool = False, finalize: bool = True
    ) -> FlowItem:
        return FlowItem(
            prompt=arrays["prompt_token"][0, :prompt].astype(np.int32),
            prompt_mel=torch.from_numpy(arrays["prompt_feat"][0]).to(DEVICE),
            embedding=torch.from_numpy(arrays["embedding"][0]).to(DEVICE),
            tokens=arrays["token"][0, :tokens].tolist(),
            streaming=streaming,
            finalize=finalize,
        )

    return new_item


def plain(flow: BaseFlow, one: FlowItem) -> torch.Tensor:
    """(frames, mels)"""
    (mel,) = PaddedFlow(flow)([one])
    return mel


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mel_full", {}),
        ("mel_stream_final", {"streaming": True}),
        ("mel_stream_partial", {"streaming": True, "finalize": False}),
        ("mel_partial_nostream", {"finalize": False}),
        ("mel_stream_prefix45", {"tokens": 45, "streaming": True, "finalize": False}),
    ],
)
def test_mel_is_the_golden_one(packed, item, arrays, name, options):
    (mel,) = packed([item(**options)])
    error = (mel.cpu() - torch.from_numpy(arrays[name][0].T)).abs().max().item()
    print(f"{name}: {error:.2e}")
    assert error < TOLERANCE


def test_items_of_a_mixed_batch_are_those_of_single_runs(flow, packed, item):
    items = [
        item(),
        item(tokens=5, prompt=0),
        item(tokens=41, streaming=True, finalize=False),
        item(tokens=4, prompt=20, streaming=True, finalize=False),
        item(tokens=1, streaming=True),
    ]
    for one, mel in zip(items, packed(items), strict=True):
        expected = plain(flow, one)
        assert mel.shape == expected.shape
        assert (mel - expected).abs().max() < TOLERANCE


@ONLY_UNET
def test_many_rows_take_the_other_way_through_the_norms(flow, item, monkeypatch):
    monkeypatch.setattr("light_tts.models.flow.unet.packed.FEW_ROWS", 0)
    items = [item(), item(tokens=41, streaming=True, finalize=False)]
    for one, mel in zip(items, new_packed(flow)(items), strict=True):
        assert (mel - plain(flow, one)).abs().max() < TOLERANCE


@ONLY_UNET
@pytest.mark.parametrize("resnets", [False, True])
def test_blocks_in_one_kernel_compute_the_same(flow, item, resnets, monkeypatch):
    blocks_in_one_kernel(monkeypatch, rows=400, resnets=resnets)  # the second batch has more
    packed = new_packed(flow)
    items = [item(), item(tokens=5, prompt=0), item(tokens=41, streaming=True, finalize=False)]
    for batch in (items[1:], items):
        for one, mel in zip(batch, packed(batch), strict=True):
            assert (mel - plain(flow, one)).abs().max() < TOLERANCE


@ONLY_UNET
def test_many_short_items_have_room_in_residual_blocks_in_one_kernel(flow, item, monkeypatch):
    blocks_in_one_kernel(monkeypatch)
    items = [item(tokens=4, prompt=0) for _ in range(8)]  # 64 frames; the tiles for them lack room for edges
    packed = new_packed(flow)
    expected = plain(flow, items[0])
    for mel in packed(items):
        assert (mel - expected).abs().max() < TOLERANCE


def test_a_batch_that_is_too_large_is_solved_in_pieces(flow, item, monkeypatch):
    monkeypatch.setattr("light_tts.models.flow.packed.ROW_LIMIT", 100)
    monkeypatch.setattr("light_tts.models.flow.packed.ENCODER_LIMIT", 40)
    items = [item(tokens=9), item(tokens=57), item(tokens=3), item(tokens=20, prompt=0)]
    for one, mel in zip(items, new_packed(flow)(items), strict=True):
        assert (mel - plain(flow, one)).abs().max() < TOLERANCE


def test_items_that_cannot_be_spoken_are_refused(packed, item):
    with pytest.raises(ValueError, match="nothing to speak"):
        packed([item(tokens=3, finalize=False)])
    with pytest.raises(ValueError, match="15000"):
        packed([item(tokens=1), replace(item(), tokens=[1] * 7500)])


@pytest.mark.parametrize("frames", [1, 63, 64, 65, 250, 251, 424, 1000, 8192, 8193, 15000])
def test_buckets_waste_little(frames):
    assert frames <= _bucket(frames) <= max(frames + 63, 1.25 * frames)


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs are real on a GPU, see below")
def test_sizes_are_recorded_from_a_single_first_chunk_on_and_change_nothing(flow, item, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", stand_in_graph.capture)
    recorded, record = [], GraphCache.record
    monkeypatch.setattr(GraphCache, "record", lambda self, key: (recorded.append(key), record(self, key))[0])
    items = [item(), item(tokens=41, streaming=True, finalize=False)]
    packed = new_packed(flow)
    expected = packed(items)
    packed.graphs = GraphCache(torch.device("cuda", 0))
    packed.warm_up(2)
    widths = range(32, 257, 32)
    first = [("encode", 1, width) for width in widths]
    first += [("step", size) for size in _buckets(640)]
    assert recorded == first
    for _ in range(3):
        for mel, known in zip(packed(items), expected, strict=True):
            assert torch.equal(mel, known)
        packed.graphs.record_next()
    # one that this batch has used, the largest, the smallest; the batch's Euler step is among the first
    assert recorded[len(first) :] == [("encode", 2, 96), ("encode", 2, 256), ("step", 768)]
    while packed.graphs.record_next():
        pass
    assert len(packed.graphs) == len(set(recorded)) == 17 + 2 * len(widths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision_on_a_gpu(flow, family, item, dtype, tolerance):
    """Relative error (norm) of the mel spectrogram against float32."""
    torch.cuda.set_stream(torch.cuda.Stream())
    half = load_flow(family, DEVICE, dtype)
    packed = PackedFlow(half, *pack(flow, dtype), items=8)
    for one, mel in zip([item(), item(streaming=True)], packed([item(), item(streaming=True)]), strict=True):
        expected = plain(flow, one)
        error = ((mel - expected).norm() / expected.norm()).item()
        print(f"{dtype}: {error:.2e}")
        assert error < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_and_overlapping_kernels_change_nothing(flow, item, monkeypatch):
    items = [item(), item(tokens=41, streaming=True, finalize=False)]
    expected = new_packed(flow, graphs=False)(items)
    for value in (False, True):
        monkeypatch.setattr(overlap, "enabled", lambda *_, value=value: value)
        for graphs, at_first_use in ((False, False), (True, False), (True, True)):
            packed = new_packed(flow, graphs=graphs)
            packed.graphs.at_first_use = at_first_use
            for _ in range(3):
                packed.graphs.record_next()  # without a graph at first, then with one or two
                for mel, known in zip(packed(items), expected, strict=True):
                    assert torch.equal(mel, known)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("few", "joined", "tile_rows"),
    [(True, False, None), (False, False, None), (True, True, None), (True, True, 16), (True, True, 32)],
    ids=["few", "many", "one", "resnets", "resnets of 32"],
)  # rows: see packed_linear; one kernel for a block, and for a residual block
@pytest.mark.parametrize("lengths", [(249,), (1, 100, 37, 64, 200)], ids=len)
def test_overlapping_steps_of_full_width_change_nothing(lengths, few, joined, tile_rows, monkeypatch):
    """All Euler steps in one CUDA graph, at the widths of CosyVoice2-0.5B, again and again."""
    if joined and not available(DEVICE):
        pytest.skip("no GPU for blocks in one kernel")
    torch.manual_seed(0)
    config = EstimatorConfig(
        in_channels=320,
        out_channels=80,
        channels=256,
        n_blocks=2,
        num_mid_blocks=2,
        num_heads=8,
        attention_head_dim=64,
        static_chunk_size=50,
    )
    module = Estimator(config, 1024).to(DEVICE).requires_grad_(False)
    estimator = PackedEstimator(module, euler_steps(10), 0.7, torch.float16)
    total, size, block_rows = sum(lengths), _bucket(sum(lengths)), 32
    buffers = estimator.allocate(size).first(size, few, joined)
    blocks = 0 if joined else size // block_rows + 8
    rows = Rows(buffers, blocks, block_rows, tile_rows=tile_rows)
    table = rows.empty()
    parts = rows.parts(table)
    parts.position.reshape(COPIES, size)[:, :total] = np.concatenate([np.arange(n) for n in lengths])
    chunks = [config.static_chunk_size * (index % 2) for index in range(len(lengths))]
    rows.place_attention(parts, lengths, chunks)
    if tile_rows is not None:
        lines = rows.parts(table).lines
        lines[:] = lines_of(lengths, len(lines))
    table = torch.from_numpy(table).to(DEVICE)
    noise, inputs = torch.randn_like(buffers.x), torch.randn_like(buffers.inputs)
    inputs[:, : estimator.mels] = noise.repeat(COPIES, 1)

    def begin() -> None:
        rows.table.copy_(table)
        buffers.x.copy_(noise)
        buffers.inputs.copy_(inputs)

    results = []
    for value in (False, True):
        monkeypatch.setattr(overlap, "enabled", lambda *_, value=value: value)
        begin()
        for _ in range(estimator.steps):  # one by one, and compiles
            estimator.step(rows)
        results.append(buffers.x[:total].clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(estimator.steps):
                estimator.step(rows)
        for _ in range(10):
            begin()
            graph.replay()
            results.append(buffers.x[:total].clone())
    assert results[0].isfinite().all() and not torch.equal(results[0], noise[:total])
    assert all(torch.equal(result, results[0]) for result in results)
