"""The causal vocoder: against the goldens, and chunk by chunk against the whole of a part."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.models.vocoder.backend import choose_causal_vocoder
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.causal_stream import TorchCausalVocoder
from light_tts.models.vocoder.interface import CausalItem, CausalVocoder, SourceNoise

GOLDEN = Path("test/golden/cosyvoice3")
CONFIG = load_config3(GOLDEN / "checkpoint")
FRAME = 480  # samples
ROUNDING = 2e-6  # of float32, in samples of up to 1; 6e-7 is the most that was seen


@pytest.fixture(scope="module")
def hift() -> CausalHift:
    return CausalHift.from_checkpoint(GOLDEN / "checkpoint", CONFIG, "cpu")


@pytest.fixture(scope="module")
def vocoder(hift: CausalHift) -> CausalVocoder:
    return choose_causal_vocoder(hift)()


def random_mel(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(80, frames, generator=torch.Generator().manual_seed(seed)) * 2 - 4


def in_chunks(
    vocoder: CausalVocoder, mel: torch.Tensor, bounds: Iterable[int], noise: SourceNoise | None = None
) -> list[torch.Tensor]:
    """The samples of each chunk; bounds: the ends of those that are not final."""
    state, start, waves = None, 0, []
    for end in bounds:
        [(wave, state)] = vocoder.speak([CausalItem(mel[:, start:end], state, False, noise)])
        assert state is not None
        waves.append(wave)
        start = end
    [(wave, state)] = vocoder.speak([CausalItem(mel[:, start:], state, True, noise)])
    assert state is None
    return [*waves, wave]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = torch.load(GOLDEN / "checkpoint/hift.pt", weights_only=True)
    del state["conv_post.bias"]
    torch.save(state, tmp_path / "hift.pt")
    with pytest.raises(CheckpointError, match=r"hift.pt: tensor conv_post.bias"):
        CausalHift.from_checkpoint(tmp_path, CONFIG, "cpu")


@pytest.mark.parametrize("bounds", [[], [7, 8, 30]], ids=["whole", "chunks"])
def test_wave_is_the_golden_one(vocoder: CausalVocoder, bounds: list[int]) -> None:
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "hift.npz").items()}
    wave = torch.cat(in_chunks(vocoder, golden["mel"][0], bounds))
    torch.testing.assert_close(wave, golden["inference_noise0_wav"][0], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    ("frames", "bounds"),
    [
        (50, [50]),  # a last chunk without frames
        (45, range(1, 45)),  # single frames
        (3, [1, 2]),  # fewer than are held back
        (8, [8]),
        (9, [8, 9]),
        (1, [0]),
        (300, [280]),
        (300, [50, 100, 150, 200, 250]),
        (120, [36, 37, 38]),  # where the first frames are no longer needed
        *((150, sorted(random.Random(seed).choices(range(151), k=9))) for seed in range(5)),
    ],
)
def test_chunks_are_the_whole(vocoder: CausalVocoder, frames: int, bounds: Iterable[int]) -> None:
    mel, noise = random_mel(frames, seed=frames), SourceNoise(seed=5, part=2, first_sample=0)
    [whole] = in_chunks(vocoder, mel, [], noise)
    assert len(whole) == frames * FRAME
    waves = in_chunks(vocoder, mel, bounds, noise)
    torch.testing.assert_close(torch.cat(waves), whole, atol=ROUNDING, rtol=0)
    sent = 0
    for end, wave in zip(bounds, waves, strict=False):
        sent += len(wave)
        assert sent == max(end * FRAME - vocoder.held_back, 0)


def test_eight_frames_are_held_back(vocoder: CausalVocoder) -> None:
    assert vocoder.held_back == 8 * FRAME


def test_a_part_without_frames_has_no_samples(vocoder: CausalVocoder) -> None:
    assert [len(wave) for wave in in_chunks(vocoder, random_mel(0), [0])] == [0, 0]


def test_phase_does_not_drift_in_a_long_part(hift: CausalHift, vocoder: CausalVocoder) -> None:
    mel = random_mel(1).expand(80, 1200)
    wave = torch.cat(in_chunks(vocoder, mel, range(200, 1200, 200)))
    torch.testing.assert_close(wave, hift.inference(mel[None])[0][0], atol=ROUNDING, rtol=0)


def test_work_and_memory_of_a_chunk_do_not_grow_with_the_part(
    hift: CausalHift, vocoder: CausalVocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, decode = [], hift.decode

    def counted(mel: torch.Tensor, source: torch.Tensor, *ends: bool) -> torch.Tensor:
        sizes.append((mel.shape[2], source.shape[1]))
        return decode(mel, source, *ends)

    monkeypatch.setattr(hift, "decode", counted)
    state, kept = None, []
    for seed in range(6):
        [(_, state)] = vocoder.speak([CausalItem(random_mel(40, seed), state, False, None)])
        kept.append((state.mel.shape[1], state.source.shape[0]))
    assert sizes[2:] == [(22 + 40 + 5, hift.source_context + (40 + 5) * FRAME)] * 4
    assert kept[1:] == [kept[1]] * 5


@pytest.mark.parametrize(
    "change",
    [
        {"conv_pre_look_right": 2},
        {"upsample_kernel_sizes": (9, 4, 11)},
        {"upsample_rates": (6, 5, 4), "upsample_kernel_sizes": (12, 11, 8)},
        {"upsample_rates": (30, 4), "upsample_kernel_sizes": (7, 3)},
        {"resblock_kernel_sizes": (3, 5), "resblock_dilation_sizes": ((1, 2), (3,))},
        {"source_resblock_dilation_sizes": ((1,), (1, 1), (2, 7))},
        {"istft_n_fft": 24, "istft_hop_len": 4},
        {"istft_n_fft": 8, "istft_hop_len": 4},
    ],
    ids=str,
)
def test_context_follows_from_the_configuration(change: dict) -> None:
    torch.manual_seed(1)
    config = dataclasses.replace(CONFIG.hift, base_channels=16, **change)
    hift = CausalHift(config).eval().requires_grad_(False)
    mel, vocoder = random_mel(70), TorchCausalVocoder(hift, batched=False)
    assert vocoder.held_back == (4 + config.conv_pre_look_right) * FRAME
    waves = in_chunks(vocoder, mel, [45, 46, 60])
    torch.testing.assert_close(torch.cat(waves), hift.inference(mel[None])[0][0], atol=ROUNDING, rtol=0)


def test_noise_is_that_of_the_seed_and_the_part(vocoder: CausalVocoder) -> None:
    mel = random_mel(20)
    noises = [SourceNoise(1, 1, 0), SourceNoise(1, 1, 999), SourceNoise(2, 1, 0), SourceNoise(1, 2, 0), None]
    first, *others = (in_chunks(vocoder, mel, [], noise)[0] for noise in noises)
    assert [torch.equal(first, other) for other in others] == [True, False, False, False]


@pytest.mark.parametrize("batched", [False, True])
def test_items_do_not_depend_on_each_other(hift: CausalHift, batched: bool) -> None:
    together, alone = TorchCausalVocoder(hift, batched), TorchCausalVocoder(hift, batched=False)
    noise = SourceNoise(3, 0, 0)
    starts = [
        CausalItem(random_mel(frames, seed), None, False, noise if seed % 2 else None)
        for seed, frames in enumerate([50, 60, 50, 5, 60])
    ]
    states = [state for _, state in together.speak(starts)]
    items = [
        CausalItem(random_mel(25, 9 + row), state, row == 3, start.noise)
        for row, (state, start) in enumerate(zip(states, starts, strict=True))
    ]
    for batch in (starts, items, items[:3]):  # states are not changed, so they can be used twice
        for item, (wave, _) in zip(batch, together.speak(batch), strict=True):
            [(expected, _)] = alone.speak([item])
            torch.testing.assert_close(wave, expected, atol=ROUNDING if batched else 0, rtol=0)
