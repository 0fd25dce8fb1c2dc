"""training/vocoder/vocoder.py on random data: crops, losses, both phases, and what is exported."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.frontend.features import flow_mels
from light_tts.models.vocoder.hift import Hift
from training.checkpoint import checkpoint_folder, training_file
from training.corpus.corpus import Corpus
from training.loop import train
from training.vocoder import discriminators, vocoder
from training.vocoder.flow_mels import FlowMels
from training.vocoder.spectral_losses import mel_distance, stft_distance
from training.vocoder.vocoder import (
    CONTEXT,
    FRAMES,
    MATCHING_WEIGHT,
    SAMPLES_PER_FRAME,
    Training,
    crops,
    f0_distance,
    predicted_f0,
    speak,
)

GOLDEN = load_config(Path("test/golden/cosyvoice2/checkpoint"))
CONFIG = dataclasses.replace(
    GOLDEN, hift=dataclasses.replace(GOLDEN.hift, base_channels=16, f0_cond_channels=16)
)


@pytest.fixture(scope="module", autouse=True)
def same_random():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Two utterances: a buzz of 200 Hz that ends in silence, and noise."""
    random = np.random.default_rng(0)
    frames = (150, 60)
    time = np.arange(frames[0] * SAMPLES_PER_FRAME) / 24_000
    buzz = sum(np.sin(2 * np.pi * 200 * n * time) / n for n in range(1, 20)) * (time < 2.0)
    waves = [buzz * 0.2, random.standard_normal(frames[1] * SAMPLES_PER_FRAME) * 0.05]
    f0 = [np.where(np.arange(frames[0]) < 100, 200.0, 7.0), np.full(frames[1], 30.0)]
    labels = [
        (np.zeros(n, np.int64), values.astype(np.float32)) for n, values in zip(frames, f0, strict=True)
    ]
    return Corpus(
        [{"speaker": "a"}, {"speaker": "b"}],
        [(wave * 32767).astype(np.int16) for wave in waves],
        labels,
        torch.device("cpu"),
    )


@pytest.fixture
def small(monkeypatch):
    """Judges that take no time."""
    monkeypatch.setattr(discriminators, "PERIODS", (2, 7))
    monkeypatch.setattr(discriminators, "RESOLUTIONS", (512,))
    channels = {"PeriodDiscriminator": (4, 8, 8), "SpectrumDiscriminator": 4}
    for name, value in channels.items():
        monkeypatch.setattr(getattr(discriminators, name).__init__, "__defaults__", (value,))


def test_a_crop_has_the_mel_of_the_whole_utterance_and_a_clean_pitch(corpus):
    found = crops(corpus, CONFIG.mel, torch.tensor([0]), torch.tensor([80]))
    wave = corpus.wave[: 150 * SAMPLES_PER_FRAME].float() / 32768
    whole = flow_mels(wave[None], CONFIG.mel)[:, :, 80 - CONTEXT : 80 + FRAMES + CONTEXT]
    torch.testing.assert_close(found.mel[:, :, 2:-2], whole[:, :, 2:-2], atol=1e-4, rtol=0)
    assert torch.equal(found.wave[0], wave[80 * SAMPLES_PER_FRAME :][: FRAMES * SAMPLES_PER_FRAME])
    assert found.f0[0].tolist() == [200.0] * 20 + [0.0] * 12  # 7 Hz is unvoiced


def test_crops_lie_within_their_utterances(corpus, small):
    training = Training(CONFIG, corpus, batch=2, pitched=500)
    index, begin = training.draw()
    assert len(index) == 500
    assert set(index.tolist()) == {0, 1}
    assert (begin >= 0).all() and (begin + FRAMES <= corpus.frames[index]).all()


def test_losses_are_zero_for_the_same_wave_and_their_gradient_is_finite_in_silence():
    wave = torch.randn(1, FRAMES * SAMPLES_PER_FRAME) * 0.1
    assert mel_distance(wave, wave, 24_000) == 0 and stft_distance(wave, wave) == 0
    assert f0_distance(torch.tensor([[220.0, 10.0]]), torch.tensor([[200.0, 0.0]])) == pytest.approx(0.1)
    silence = torch.zeros_like(wave).requires_grad_()
    loss = mel_distance(silence, wave, 24_000) + stft_distance(silence, wave)
    loss = loss + discriminators.adversarial_loss([discriminators.SpectrumDiscriminator(512, 4)(silence)])
    loss.backward()
    assert torch.isfinite(silence.grad).all()


def test_the_loss_falls_on_a_repeated_batch(corpus, small):
    training = Training(CONFIG, corpus, batch=2, pitched=3)
    training.learners["model"].set_rate(10.0)
    batch = torch.tensor([0, 1]), torch.tensor([85, 10])
    values = [training.shape(*batch) for _ in range(10)]
    for name in ("mel", "stft", "f0"):
        assert values[-1][name] < 0.8 * values[0][name], name


def test_a_share_of_the_mels_is_of_the_flows_making(corpus):
    frames = corpus.frames.tolist()
    made = FlowMels(torch.ones(sum(frames), 80).half(), corpus.label_start, torch.tensor([frames[0], 0]))
    index, begin = torch.tensor([0] * 400 + [1] * 10), torch.tensor([40] * 410)
    found = crops(corpus, CONFIG.mel, index, begin, made=made, share=0.6)
    taken = (found.mel == 1).flatten(1).all(1)
    assert 200 < int(taken[:400].sum()) < 280 and not taken[400:].any()
    clean = crops(corpus, CONFIG.mel, index, begin)
    assert torch.equal(found.mel[~taken], clean.mel[~taken]) and torch.equal(found.wave, clean.wave)


def test_judges_tell_waves_apart_and_the_vocoder_learns_through_them(corpus, small):
    training = Training(CONFIG, corpus, batch=2, pitched=3)
    for learner in training.learners.values():
        learner.set_rate(10.0)
    batch = torch.tensor([0, 1]), torch.tensor([85, 10])
    values = [training.compete(*batch) for _ in range(8)]
    assert values[-1]["discriminator"] < 0.8 * values[0]["discriminator"]
    assert values[-1]["mel"] < values[0]["mel"]
    assert all(p.requires_grad for p in training.discriminators.parameters())


def test_judges_that_hear_once_teach_as_judges_that_hear_twice(corpus, small):
    """The gradients of a step, with rates of 0, are those of separate passes."""
    training = Training(CONFIG, corpus, batch=2, pitched=3)
    batch = torch.tensor([0, 1, 0]), torch.tensor([85, 10, 30])
    torch.manual_seed(1)
    training.compete(*batch)
    found = [[p.grad.clone() for p in m.parameters()] for m in (training.model, training.discriminators)]

    training.model.zero_grad()
    training.discriminators.zero_grad()
    torch.manual_seed(1)
    given, wave, f0 = training._speak(*batch, predicted=True)
    real, made = training.discriminators(given.wave), training.discriminators(wave.detach())
    discriminators.discriminator_loss(real, made).backward()
    expected = [[p.grad.clone() for p in training.discriminators.parameters()]]
    made = training.discriminators(wave)
    loss = vocoder.MEL_WEIGHT * mel_distance(wave, given.wave, 24_000)
    loss = loss + vocoder.F0_WEIGHT * f0_distance(f0, given.f0) + discriminators.adversarial_loss(made)
    (loss + MATCHING_WEIGHT * discriminators.feature_matching_loss(real, made)).backward(
        inputs=list(training.model.parameters())
    )
    expected = [[p.grad for p in training.model.parameters()], *expected]
    for ours, theirs in zip(found, expected, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            assert (own - other).norm() <= 1e-3 * other.norm() + 1e-5


def test_the_wave_does_not_teach_the_pitch(corpus):
    training = Training(CONFIG, corpus, batch=1, pitched=1)
    _, wave, _ = training._speak(torch.tensor([0]), torch.tensor([50]), predicted=True)
    wave.square().mean().backward()
    model = training.model
    assert all(p.grad is None for p in model.f0_predictor.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if "f0_predictor" not in name)


def test_pitch_is_learnt_of_more_crops_than_are_spoken(corpus, small):
    training = Training(CONFIG, corpus, batch=2, pitched=3)
    given, wave, f0 = training._speak(*training.draw(), predicted=True)
    assert wave.shape == given.wave.shape == (2, FRAMES * SAMPLES_PER_FRAME)
    assert f0.shape == given.f0.shape == (3, FRAMES)
    assert len(speak(training.model, given.mel, given.f0)) == 3
    assert predicted_f0(training.model, given.mel).shape == f0.shape


def test_the_exported_vocoder_is_the_averaged_one(corpus, small, tmp_path):
    """Both phases to one file, which the second goes on from."""
    training, path = Training(CONFIG, corpus, batch=2, pitched=3), training_file(tmp_path, vocoder.NAME)
    for step in (training.shape, training.compete):
        train(vocoder.NAME, path, training.learners, step, training.draw, minutes=0.001, total=1.0)
    checkpoint_folder(tmp_path).mkdir()
    vocoder.export(tmp_path)
    exported = Hift.from_checkpoint(checkpoint_folder(tmp_path), CONFIG, "cpu")
    averaged = vocoder.load_averaged(Hift(CONFIG.hift), path)
    mel = torch.randn(1, 80, 40) - 4
    source = torch.randn(1, 40 * SAMPLES_PER_FRAME) * 0.1
    with torch.no_grad():
        expected = averaged.decode(mel, source, [40])
        assert (exported.decode(mel, source, [40]) - expected).norm() < 5e-3 * expected.norm()
        torch.testing.assert_close(exported.f0(mel, [40]), averaged.f0(mel, [40]), atol=0.2, rtol=2e-3)
    assert "mel L1" in vocoder.copy_synthesis(averaged, corpus, CONFIG.mel)
