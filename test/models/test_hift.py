"""The vocoder: against the goldens (parity.py holds every array), in padded batches, with every naming."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.models.vocoder.hift import Hift

GOLDEN = Path("test/golden/cosyvoice2")
MANIFEST = Path("test/golden/state_dict/CosyVoice2-0.5B.hift.tsv")
CONFIG = load_config(GOLDEN / "checkpoint")
RELEASED = dataclasses.replace(CONFIG.hift, base_channels=512, f0_cond_channels=512)


@pytest.fixture(scope="module")
def hift() -> Hift:
    return Hift.from_checkpoint(GOLDEN / "checkpoint", CONFIG, "cpu")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "hift.npz").items()}


def test_names_and_shapes_are_those_of_the_released_checkpoint():
    with torch.device("meta"):
        state = Hift(RELEASED).state_dict()
    lines = [line.split("\t") for line in MANIFEST.read_text().splitlines()[1:]]
    assert [(name, "x".join(map(str, tensor.shape))) for name, tensor in state.items()] == [
        (name, shape) for name, shape, _ in lines
    ]


@pytest.mark.parametrize("cached", [False, True])
def test_wave_is_the_golden_one(hift, golden, cached):
    cache = [golden["cache_source"].flatten()] if cached else None
    wave, _ = hift.inference(golden["mel"], [50], cache)
    # The phase sums the pitch up, so that processors whose convolutions round otherwise differ by about 1e-4;
    # from a given source the wave is compared to 1e-4 by parity.py, where they differ by 2e-7.
    torch.testing.assert_close(
        wave, golden["inference_cached_wav" if cached else "inference_noise0_wav"], atol=1e-3, rtol=0
    )


def test_given_noise_gives_the_golden_source(hift, golden):
    noise = torch.zeros(1, 24000, 9)
    noise[:, :2400] = golden["gauss_noise"]
    source = hift.m_source(golden["f0_in"], noise)[:, :2400]
    torch.testing.assert_close(source, golden["source_fixed_noise"][:, 0], atol=1e-6, rtol=0)


def test_padded_batch_equals_single_runs(hift):
    random = torch.Generator().manual_seed(5)
    lengths = [58, 1, 33, 2, 57]
    mel = torch.randn(5, 80, 58, generator=random) * 2 - 4
    noise = torch.randn(5, 58 * 480, 9, generator=random)
    cache = [None, None, torch.rand(3840, generator=random) - 0.5, None, torch.zeros(480)]
    waves, sources = hift.inference(mel, lengths, cache, noise)
    pitches = hift.f0(mel, lengths)
    for row, length in enumerate(lengths):
        one, samples = slice(row, row + 1), length * 480
        own_mel, own_noise = mel[one, :, :length], noise[one, :samples]
        # From a given source: rounding only.
        wave = hift.decode(own_mel, sources[one, :samples], [length])
        torch.testing.assert_close(waves[one, :samples], wave, atol=2e-6, rtol=0)
        assert not waves[row, samples:].any()
        # From a given pitch: the same numbers, but for the sine: vector units and the rest at the end of a
        # row may round it differently.
        torch.testing.assert_close(
            hift.m_source(pitches[one, :length], own_noise),
            hift.m_source(pitches, noise)[one, :samples],
            atol=1e-7,
            rtol=0,
        )
        torch.testing.assert_close(pitches[one, :length], hift.f0(own_mel, [length]), atol=1e-3, rtol=0)
        # Altogether: the phase is a long sum of pitches, which magnifies rounding.
        wave, _ = hift.inference(own_mel, [length], cache[one], own_noise)
        torch.testing.assert_close(waves[one, :samples], wave, atol=1e-3, rtol=0)


def test_what_lies_in_the_padding_is_never_read(hift):
    mel = torch.randn(2, 80, 40, generator=torch.Generator().manual_seed(6))
    other = mel.clone()
    other[1, :, 30:] = 1e4
    waves, others = hift.inference(mel, [40, 30])[0], hift.inference(other, [40, 30])[0]
    assert torch.equal(waves, others)


@pytest.mark.parametrize("naming", ["generator", "weight_g"])
def test_older_names_are_accepted(hift, golden, tmp_path, naming):
    state = torch.load(GOLDEN / "checkpoint/hift.pt", weights_only=True)
    if naming == "generator":
        state = {f"generator.{name}": tensor for name, tensor in state.items()}
    else:
        state = {
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): tensor
            for name, tensor in state.items()
        }
    torch.save(state, tmp_path / "hift.pt")
    older = Hift.from_checkpoint(tmp_path, CONFIG, "cpu")
    assert torch.equal(older.inference(golden["mel"], [50])[0], hift.inference(golden["mel"], [50])[0])


def test_a_missing_tensor_is_named(tmp_path):
    state = torch.load(GOLDEN / "checkpoint/hift.pt", weights_only=True)
    del state["conv_post.bias"]
    torch.save(state, tmp_path / "hift.pt")
    with pytest.raises(CheckpointError, match=r"hift.pt: tensor conv_post.bias"):
        Hift.from_checkpoint(tmp_path, CONFIG, "cpu")
