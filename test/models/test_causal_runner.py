"""The causal vocoder on its kernels: against PyTorch, chunk by chunk and in batches, sizes of graphs.

Without a GPU it runs through the interpreter: mostly a model with few and short convolutions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import stand_in_graph
from support.interpreter import GPU as CUDA

pytest.importorskip("triton")

from light_tts.common import cuda_graphs
from light_tts.common.cuda_graphs import GraphCache
from light_tts.kernels.launch import Config
from light_tts.kernels.vocoder import causal_source, mean, spectrum
from light_tts.kernels.vocoder import conv as hift_conv
from light_tts.kernels.vocoder.layout import Convolutions, Sums
from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.vocoder import causal_runner
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.causal_network import CausalNetwork
from light_tts.models.vocoder.causal_runner import CausalRunner
from light_tts.models.vocoder.causal_stream import TorchCausalVocoder
from light_tts.models.vocoder.causal_window import Tail
from light_tts.models.vocoder.interface import CausalItem, SourceNoise

CHECKPOINT = Path("test/golden/cosyvoice3/checkpoint")
CONFIG = load_config3(CHECKPOINT)
DEVICE = torch.device("cuda" if CUDA else "cpu")
FRAME = 480  # samples
TURNS = 6e-8 if CUDA else 1e-9  # a GPU may round the quotient in float32 that is summed differently
LIMIT = 5e-3 if CUDA else 2e-5  # in float32; on a GPU as TF32, which tensor cores may cut off
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")

Spoken = list[tuple[torch.Tensor, Tail | None]]


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """The interpreter is slow: no padding of time beyond a few frames, and few programs, which take it long
    whatever their size."""
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setattr(causal_runner, "frames_of_graph", lambda frames: frames + 1)
            patch.setattr(hift_conv, "convolve_config", wide_tiles)
            for module, size in (
                (causal_source, "BLOCK"),
                (mean, "BLOCK"),
                (spectrum, "FRAMES"),
                (spectrum, "HOPS"),
            ):
                patch.setattr(module, size, 1 << 13)
        yield


def wide_tiles(conv: Convolutions, rows: int, sums: Sums) -> Config:
    frames, channels = (max(16, 1 << (n - 1).bit_length()) for n in (rows, conv.channels_out))
    return {"BLOCK_FRAMES": min(frames, 2048), "BLOCK_OUT": min(channels, 64)}


@pytest.fixture(scope="module")
def hift() -> CausalHift:
    return CausalHift.from_checkpoint(CHECKPOINT, CONFIG, "cpu")


@pytest.fixture(scope="module")
def small() -> CausalHift:
    torch.manual_seed(1)
    config = dataclasses.replace(
        CONFIG.hift,
        base_channels=16,
        upsample_rates=(12, 10),
        upsample_kernel_sizes=(16, 7),
        resblock_kernel_sizes=(3, 2),
        resblock_dilation_sizes=((2,), (1,)),
        source_resblock_kernel_sizes=(2, 3),
        source_resblock_dilation_sizes=((1,), (3,)),
    )
    found = CausalHift(config).eval().requires_grad_(False)
    found.f0_predictor.classifier.weight.mul_(40.0)
    found.f0_predictor.classifier.bias.fill_(180.0)
    return found


def network_of(
    hift: CausalHift, dtype: torch.dtype, kind: type[CausalNetwork] = CausalNetwork
) -> CausalNetwork:
    return kind(copy.deepcopy(hift).to(DEVICE), dtype)


@pytest.fixture(scope="module")
def network(small: CausalHift) -> CausalNetwork:
    return network_of(small, torch.float32)


def random_mel(frames: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(80, frames, generator=torch.Generator().manual_seed(seed)) * 2 - 4).to(DEVICE)


def spoken_plainly(hift: CausalHift, items: list[CausalItem]) -> Spoken:
    """On the CPU, where PyTorch rounds divisions as the kernels do."""
    moved = [moved_to("cpu", item) for item in items]
    return TorchCausalVocoder(hift, batched=False).speak(moved)


def moved_to(device: torch.device | str, item: CausalItem) -> CausalItem:
    state = item.state
    if isinstance(state, Tail):
        tensors = {name: getattr(state, name).to(device) for name in ("mel", "source", "turns")}
        state = dataclasses.replace(state, **tensors)
    return dataclasses.replace(item, mel=item.mel.to(device), state=state)


def items_of(hift: CausalHift) -> list[CausalItem]:
    """A later chunk, a first one, one that is too short for samples, a last one without frames, and a whole
    part."""
    noise = SourceNoise(-3, 2, 0)
    states = []
    for seed, frames in enumerate((hift.reach.context + 12, 6)):
        [(_, state)] = spoken_plainly(hift, [CausalItem(random_mel(frames, seed), None, False, noise)])
        states.append(state)
    assert isinstance(states[0], Tail) and states[0].first_frame == 4
    items = [
        CausalItem(random_mel(5, 2), states[0], False, noise),
        CausalItem(random_mel(11, 3), None, False, SourceNoise(2**63, 0, 0)),
        CausalItem(random_mel(2, 4), None, False, noise),
        CausalItem(random_mel(0), states[1], True, None),
        CausalItem(random_mel(3, 5), None, True, noise),
    ]
    return [moved_to(DEVICE, item) for item in items]


@pytest.fixture(scope="module")
def items(small: CausalHift) -> list[CausalItem]:
    return items_of(small)


@pytest.fixture(scope="module")
def together(network: CausalNetwork, items: list[CausalItem], few_programs: None) -> Spoken:
    """The interpreter is slow: what others are compared with is computed once."""
    return CausalRunner(network).speak(items)


def level(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def check(found: Spoken, expected: Spoken, limit: float) -> None:
    for (wave, state), (plain_wave, plain_state) in zip(found, expected, strict=True):
        wave = wave.cpu()
        assert wave.shape == plain_wave.shape
        if len(wave):
            assert level(wave - plain_wave) < limit * level(plain_wave)
        assert (state is None) == (plain_state is None)
        if state is not None:
            assert state.first_frame == plain_state.first_frame
            assert torch.equal(state.mel.cpu(), plain_state.mel)
            torch.testing.assert_close(state.source.cpu(), plain_state.source, atol=5e-6, rtol=0)
            torch.testing.assert_close(state.turns.cpu(), plain_state.turns, atol=TURNS, rtol=0)


def equal(found: Spoken, expected: Spoken) -> None:
    for (wave, state), (expected_wave, expected_state) in zip(found, expected, strict=True):
        assert torch.equal(wave, expected_wave)
        if expected_state is not None:
            for name in ("mel", "source", "turns"):
                assert torch.equal(getattr(state, name), getattr(expected_state, name))


def test_a_batch_of_any_chunks_equals_the_plain_path(small, items, together):
    assert [len(wave) // FRAME for wave, _ in together] == [5, 3, 0, 6, 3]
    check(together, spoken_plainly(small, items), LIMIT)


def test_states_are_not_changed(small, items, together):
    for item, again in zip(items, items_of(small), strict=True):
        if item.state is not None:
            assert torch.equal(item.state.source, again.state.source)
            assert torch.equal(item.state.turns, again.state.turns)


def test_an_item_does_not_depend_on_its_neighbours_nor_on_the_size_of_the_graph(network, items, together):
    equal(CausalRunner(network).speak(items[1:2]), together[1:2])


def test_what_lies_in_the_room_is_never_read(network, items, together):
    runner = CausalRunner(network, max_frames=256)
    for name in ("_mel", "_source", "_wave", "before", "after"):
        getattr(runner._room, name).fill_(float("nan"))
    equal(runner.speak(items[1:3]), together[1:3])


def test_a_batch_too_large_for_one_graph_is_computed_in_parts(network, items, together):
    equal(CausalRunner(network, max_frames=1).speak(items[1:3]), together[1:3])


def test_chunks_are_the_whole(network):
    vocoder, noise, frames = CausalRunner(network), SourceNoise(5, 2, 0), 30
    mel = random_mel(frames, seed=7)
    [(whole, _)] = vocoder.speak([CausalItem(mel, None, True, noise)])
    state, start, waves = None, 0, []
    for end in (9, 28, frames):
        [(wave, state)] = vocoder.speak([CausalItem(mel[:, start:end], state, end == frames, noise)])
        waves.append(wave)
        start = end
    assert [len(wave) // FRAME for wave in waves] == [1, 19, 10]
    torch.testing.assert_close(torch.cat(waves), whole, atol=2e-6, rtol=0)


def test_no_items_are_no_work(network):
    assert CausalRunner(network).speak([]) == []


def test_a_chunk_of_the_golden_checkpoint_in_float16(hift):
    item = CausalItem(random_mel(12), None, False, SourceNoise(1, 0, 0))
    found = CausalRunner(network_of(hift, torch.float16)).speak([item])
    check(found, spoken_plainly(hift, [item]), limit=1e-3)


@pytest.mark.skipif(CUDA, reason="graphs are real on a GPU, see below")
def test_a_size_is_recorded_without_the_rows_of_a_longer_batch(small, monkeypatch):
    seen = []

    class Watched(CausalNetwork):
        def __call__(self, mel, bounds, *rest):
            seen.append([bounds.known.tolist(), bounds.source.end.tolist(), bounds.decoded.tolist()])

    monkeypatch.setattr(cuda_graphs, "capture", stand_in_graph.capture)
    runner = CausalRunner(network_of(small, torch.float32, Watched))
    runner.speak([CausalItem(random_mel(20), None, False, None)])
    runner.graphs = GraphCache(torch.device("cuda"))
    runner.graphs.at_first_use = True
    runner.speak([CausalItem(random_mel(10), None, True, None)])
    empty = [[0], [0], [0]]
    assert seen == [[[20], [17], [13]], empty, empty, [[10]] * 3]  # spoken; run once, recorded, replayed


@pytest.mark.skipif(CUDA, reason="graphs are real on a GPU")
def test_a_warm_up_plans_what_idle_moments_record(small, monkeypatch):
    sizes = set()

    class Noting(CausalNetwork):
        def __call__(self, mel, *rest):
            sizes.add(tuple(mel.shape[:2]))

    monkeypatch.setattr(cuda_graphs, "capture", stand_in_graph.capture)
    runner = CausalRunner(network_of(small, torch.float32, Noting))
    runner.graphs = GraphCache(torch.device("cuda"))
    runner.warm_up(2)
    one = {(1, frames) for frames in (64, 96, 128, 160, 224, 256)}
    assert sizes == one and len(runner.graphs) == 6
    while runner.graphs.record_next():
        pass
    assert sizes == {(rows, frames) for rows in (1, 2, 3) for _, frames in one}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.float32, 5e-3)])
def test_full_size_with_mixed_chunks(dtype, limit):
    from scripts.bench_hift import full_size_causal

    hift = full_size_causal(torch.device("cpu"))
    items = [*items_of(hift), CausalItem(random_mel(250, 8), None, False, SourceNoise(9, 1, 0))]
    runner = CausalRunner(network_of(hift, dtype))
    found = []
    for _ in range(2):  # without a graph, recorded
        found.append(runner.speak(items))
        runner.graphs.at_first_use = True
    replayed = runner.speak(items)
    assert len(runner.graphs) == 1
    for other in found:
        equal(other, replayed)
    check(replayed, spoken_plainly(hift, items), limit)
    for item, (wave, _) in zip(items, replayed, strict=True):
        [(alone, _)] = runner.speak([item])
        if len(wave):
            assert level(alone - wave) < 1e-5 * level(wave)
