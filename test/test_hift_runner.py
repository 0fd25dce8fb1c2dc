"""The vocoder on its kernels: the whole against PyTorch, independence of items, sizes of graphs.

Without a GPU the tiny checkpoint runs through the interpreter, a few frames long."""

import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from light_tts.kernels import hift_conv
from light_tts.kernels.hift_conv import Tile
from light_tts.kernels.hift_layout import Convolutions, Sums
from light_tts.models.cosyvoice2 import hift_runner
from light_tts.models.cosyvoice2.config import load_config
from light_tts.models.cosyvoice2.hift import Hift
from light_tts.models.cosyvoice2.hift_network import HiftNetwork
from light_tts.models.cosyvoice2.hift_runner import HiftRunner, frames_of_graph
from light_tts.models.cosyvoice2.vocoder import SourceNoise, TorchVocoder, choose_vocoder

CHECKPOINT = Path("test/golden/cosyvoice2/checkpoint")
CONFIG = load_config(CHECKPOINT)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CACHED = 480
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.fixture(scope="module")
def hift() -> Hift:
    return Hift.from_checkpoint(CHECKPOINT, CONFIG, DEVICE)


@pytest.fixture(autouse=True)
def small_graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow: no padding of time beyond a few frames, and few programs, which take it long
    whatever their size (test_hift_kernels.py has several tiles)."""
    if not CUDA:
        monkeypatch.setattr(hift_runner, "frames_of_graph", lambda frames: frames + 1)
        monkeypatch.setattr(hift_conv, "_tile", wide_tile)


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def wide_tile(conv: Convolutions, rows: int, sums: Sums) -> Tile:
    frames, channels = (max(16, triton.next_power_of_2(n)) for n in (rows, conv.channels_out))
    return Tile(min(frames, 512), min(channels, 64))


def level(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def batch(lengths: list[int]) -> tuple:
    random = torch.Generator().manual_seed(5)
    mel = torch.randn(len(lengths), 80, max(lengths), generator=random) * 2 - 4
    cached = [
        None if row % 2 else torch.rand(CACHED - 16 * row, generator=random) - 0.5
        for row in range(len(lengths))
    ]
    noises = [None if row == 1 else SourceNoise(7 + row, row, 480 * row) for row in range(len(lengths))]
    return (
        mel.to(DEVICE),
        lengths,
        [source if source is None else source.to(DEVICE) for source in cached],
        noises,
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.float16, 1e-3)])
def test_whole_equals_the_plain_path(hift, dtype, limit):
    lengths = [3, 1, 4]
    inputs = batch(lengths)
    waves, sources = HiftRunner(HiftNetwork(hift, dtype), CACHED).speak(*inputs)
    _, expected_sources = TorchVocoder(hift).speak(*inputs)
    if CUDA and dtype == torch.float32:
        limit = 5e-3  # multiplied as TF32, which tensor cores may cut off rather than round
    for row, length in enumerate(lengths):
        samples = slice(length * 480)
        source, expected = sources[row, samples], expected_sources[row, samples]
        assert level(source - expected) < 1e-3 * level(expected)
        wave = hift.decode(inputs[0][row : row + 1, :, :length], source[None].clone(), [length])[0]
        assert level(waves[row, samples] - wave) < limit * level(wave)
        assert not waves[row, length * 480 :].any()


def test_an_item_does_not_depend_on_its_neighbours_nor_on_the_size_of_the_graph(hift):
    runner = HiftRunner(HiftNetwork(hift), CACHED)
    mel, lengths, cached, noises = batch([2, 4])
    waves, sources = runner.speak(mel, lengths, cached, noises)
    wave, source = runner.speak(mel[:1, :, :2], lengths[:1], cached[:1], noises[:1])
    assert torch.equal(wave[0], waves[0, :960])
    assert torch.equal(source[0], sources[0, :960])


def test_what_lies_in_the_padding_is_never_read(hift):
    runner = HiftRunner(HiftNetwork(hift), CACHED)
    mel, lengths, cached, noises = batch([1, 2])
    first = runner.speak(mel, lengths, cached, noises)[0]
    mel[0, :, 1:] = float("nan")
    assert torch.equal(runner.speak(mel, lengths, cached, noises)[0], first)


def test_a_batch_too_large_for_one_graph_is_computed_in_parts(hift):
    mel, lengths, cached, noises = batch([1, 1])
    whole, _ = HiftRunner(HiftNetwork(hift), CACHED).speak(mel, lengths, cached, noises)
    parts, _ = HiftRunner(HiftNetwork(hift), CACHED, max_frames=1).speak(mel, lengths, cached, noises)
    assert torch.equal(parts, whole)


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
    sys.path.insert(0, "scripts")
    from bench_hift import full_size

    hift = full_size(DEVICE)
    lengths = [250, 76, 8, 133, 1, 249]
    inputs = batch(lengths)
    runner = HiftRunner(HiftNetwork(hift, dtype), CACHED)
    for _ in range(2):  # recorded, replayed
        waves, sources = runner.speak(*inputs)
    for row, length in enumerate(lengths):
        samples = slice(length * 480)
        source = sources[row, samples]
        own_mel = inputs[0][row : row + 1, :, :length]
        wave = hift.decode(own_mel, source[None].clone(), [length])[0]
        assert level(waves[row, samples] - wave) < limit * level(wave)
        alone, own_source = runner.speak(
            own_mel, [length], inputs[2][row : row + 1], inputs[3][row : row + 1]
        )
        torch.testing.assert_close(own_source[0], source, atol=1e-6, rtol=0)
        assert level(alone[0] - waves[row, samples]) < 1e-5 * level(wave)
