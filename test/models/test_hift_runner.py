"""The vocoder on its kernels: the whole against PyTorch, independence of items, sizes of graphs.

Without a GPU a small model runs through the interpreter, a few frames long."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support import stand_in_graph
from support.interpreter import GPU as CUDA

pytest.importorskip("triton")

from light_tts.common import cuda_graphs
from light_tts.common.cuda_graphs import GraphCache
from light_tts.kernels.launch import Config
from light_tts.kernels.vocoder import conv as hift_conv
from light_tts.kernels.vocoder.layout import Convolutions, Sums
from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.vocoder import runner as hift_runner
from light_tts.models.vocoder.backend import choose_vocoder
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.interface import MelBatch, SourceNoise
from light_tts.models.vocoder.network import HiftNetwork
from light_tts.models.vocoder.plain import TorchVocoder
from light_tts.models.vocoder.runner import HiftRunner, frames_of_graph

CHECKPOINT = Path("test/golden/cosyvoice2/checkpoint")
CONFIG = load_config(CHECKPOINT)
DEVICE = torch.device("cuda" if CUDA else "cpu")
CACHED = 480
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.fixture(scope="module")
def hift() -> Hift:
    torch.manual_seed(1)
    config = dataclasses.replace(
        CONFIG.hift,
        base_channels=16,
        upsample_rates=(12, 10),
        upsample_kernel_sizes=(16, 12),
        resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((2,), (1,)),
        source_resblock_kernel_sizes=(5, 3),
        source_resblock_dilation_sizes=((1,), (3,)),
    )
    found = Hift(config).eval().requires_grad_(False)
    found.f0_predictor.classifier.weight.mul_(40.0)
    found.f0_predictor.classifier.bias.fill_(180.0)
    return found.to(DEVICE)


@pytest.fixture(autouse=True)
def small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_for_the_interpreter(monkeypatch)


def patch_for_the_interpreter(patch: pytest.MonkeyPatch) -> None:
    """It is slow: no padding of time beyond a few frames, and few programs, which take it long whatever their
    size (test_hift_kernels.py has several tiles)."""
    if not CUDA:
        patch.setattr(hift_runner, "frames_of_graph", lambda frames: frames + 1)
        patch.setattr(hift_conv, "convolve_config", wide_tiles)


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def wide_tiles(conv: Convolutions, rows: int, sums: Sums) -> Config:
    frames, channels = (max(16, 1 << (n - 1).bit_length()) for n in (rows, conv.channels_out))
    return {"BLOCK_FRAMES": min(frames, 512), "BLOCK_OUT": min(channels, 64)}


def level(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def batch(lengths: list[int]) -> MelBatch:
    random = torch.Generator().manual_seed(5)
    mel = torch.randn(len(lengths), 80, max(lengths), generator=random) * 2 - 4
    cached = [
        None if row % 2 else torch.rand(CACHED - 16 * row, generator=random) - 0.5
        for row in range(len(lengths))
    ]
    noises = [None if row == 1 else SourceNoise(7 + row, row, 480 * row) for row in range(len(lengths))]
    return MelBatch(
        mel.to(DEVICE),
        lengths,
        [source if source is None else source.to(DEVICE) for source in cached],
        noises,
    )


LENGTHS = [3, 1, 4]


@pytest.fixture(scope="module")
def together(hift) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves and sources of the batch: the interpreter is slow, so what others are compared with is computed
    once."""
    with pytest.MonkeyPatch.context() as patch:
        patch_for_the_interpreter(patch)
        return HiftRunner(HiftNetwork(hift), CACHED).speak(batch(LENGTHS))


def check_whole(
    hift: Hift, inputs: MelBatch, waves: torch.Tensor, sources: torch.Tensor, limit: float
) -> None:
    _, expected_sources = TorchVocoder(hift).speak(inputs)
    for row, length in enumerate(inputs.lengths):
        samples = slice(length * 480)
        source, expected = sources[row, samples], expected_sources[row, samples]
        assert level(source - expected) < 1e-3 * level(expected)
        wave = hift.decode(inputs.mel[row : row + 1, :, :length], source[None].clone(), [length])[0]
        assert level(waves[row, samples] - wave) < limit * level(wave)
        assert not waves[row, length * 480 :].any()


def test_whole_equals_the_plain_path(hift, together):
    check_whole(hift, batch(LENGTHS), *together, limit=1e-3)


@pytest.mark.nightly  # with more levels and layers, which take the interpreter a minute
def test_the_golden_checkpoint_equals_the_plain_path():
    hift = Hift.from_checkpoint(CHECKPOINT, CONFIG, DEVICE)
    inputs = batch(LENGTHS)
    check_whole(hift, inputs, *HiftRunner(HiftNetwork(hift), CACHED).speak(inputs), limit=1e-3)


def test_whole_in_float32_equals_the_plain_path(hift):
    inputs = batch(LENGTHS if CUDA else [1, 2])
    limit = 5e-3 if CUDA else 2e-5  # on a GPU as TF32, which tensor cores may cut off rather than round
    check_whole(hift, inputs, *HiftRunner(HiftNetwork(hift, torch.float32), CACHED).speak(inputs), limit)


def test_an_item_does_not_depend_on_its_neighbours_nor_on_the_size_of_the_graph(hift, together):
    first = batch(LENGTHS).rows(slice(1))
    alone = HiftRunner(HiftNetwork(hift), CACHED).speak(first._replace(mel=first.mel[:, :, :3]))
    for own, whole in zip(alone, together, strict=True):
        assert torch.equal(own[0], whole[0, : 3 * 480])


def test_what_lies_in_the_padding_is_never_read(hift, together):
    two = batch(LENGTHS).rows(slice(2))
    for row, length in enumerate(two.lengths):
        two.mel[row, :, length:] = float("nan")
    waves, _ = HiftRunner(HiftNetwork(hift), CACHED).speak(two)
    assert torch.equal(waves, together[0][:2])


def test_a_batch_too_large_for_one_graph_is_computed_in_parts(hift, together):
    two = batch(LENGTHS).rows(slice(2))
    parts, _ = HiftRunner(HiftNetwork(hift), CACHED, max_frames=1).speak(two)
    assert torch.equal(parts, together[0][:2])


@pytest.mark.skipif(CUDA, reason="graphs are real on a GPU, see below")
def test_a_size_is_recorded_without_the_rows_of_a_longer_batch(hift, monkeypatch):
    lengths = []

    class Watched(HiftNetwork):
        def __call__(self, mel, found, *rest):
            lengths.append(found.tolist())

    monkeypatch.setattr(cuda_graphs, "capture", stand_in_graph.capture)
    runner = HiftRunner(Watched(hift), CACHED)
    runner.speak(batch([3]))
    runner.graphs = GraphCache(torch.device("cuda"))
    runner.graphs.at_first_use = True
    runner.speak(batch([1]))
    assert lengths == [[3], [0], [0], [1]]  # spoken; run once, recorded, replayed


def test_sizes_of_graphs():
    assert [frames_of_graph(frames) for frames in (1, 32, 33, 256, 257, 1024, 1025)] == [
        *(32, 32, 64, 256, 320, 1024, 1280)
    ]


def test_the_plain_path_serves_without_a_gpu():
    vocoder = choose_vocoder(Hift.from_checkpoint(CHECKPOINT, CONFIG, "cpu"), CACHED)()
    assert isinstance(vocoder, TorchVocoder)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.float32, 5e-3)])
def test_full_size_with_mixed_lengths(dtype, limit):
    from scripts.bench_hift import full_size

    hift = full_size(DEVICE)
    lengths = [250, 76, 8, 133, 1, 249]
    inputs = batch(lengths)
    runner = HiftRunner(HiftNetwork(hift, dtype), CACHED)
    found = []
    for _ in range(2):  # without a graph, recorded
        found.append([result.clone() for result in runner.speak(inputs)])
        runner.graphs.at_first_use = True
    waves, sources = runner.speak(inputs)  # replayed
    assert len(runner.graphs) == 1
    for wave, source in found:
        assert torch.equal(wave, waves) and torch.equal(source, sources)
    for row, length in enumerate(lengths):
        samples = slice(length * 480)
        source = sources[row, samples]
        own = inputs.rows(slice(row, row + 1))
        own_mel = own.mel[:, :, :length]
        wave = hift.decode(own_mel, source[None].clone(), [length])[0]
        assert level(waves[row, samples] - wave) < limit * level(wave)
        alone, own_source = runner.speak(own._replace(mel=own_mel))
        torch.testing.assert_close(own_source[0], source, atol=1e-6, rtol=0)
        assert level(alone[0] - waves[row, samples]) < 1e-5 * level(wave)
