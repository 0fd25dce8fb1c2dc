"""Speech tokenizer and speaker encoder of training/: what they learn, their export, the codes."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from light_tts.common import audio
from light_tts.models.checkpoint.config import MelConfig
from light_tts.models.frontend.features import kaldi_fbank
from light_tts.models.frontend.speaker import OnnxSpeakerEncoder
from light_tts.models.frontend.speech_tokenizer import OnnxSpeechTokenizer
from training.checkpoint import write_config
from training.codec import encode, speaker_encoder, speech_tokenizer
from training.codec.codes import Code, codes_file, read_codes, read_rooms, write_codes
from training.codec.features import fbanks, resample
from training.codec.speech_tokenizer import FRAME, Labelled, SpeechTokenizer, Targets, TaughtTokenizer, losses
from training.corpus import rooms
from training.corpus.corpus import SAMPLE_RATE, Corpus, speech_files
from training.corpus.crops import Crops, disturbed, tilted
from training.corpus.rooms import in_a_room
from training.loop import Learner
from training.onnx.half import rounded

CPU = torch.device("cpu")
MEL = MelConfig(n_fft=1920, num_mels=80, sampling_rate=24000, hop_size=480, win_size=1920, fmin=0, fmax=8000)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Five utterances of three speakers: noise of different loudness, with a pitch that rises."""
    lengths = (24_001, 30_000, 31_234, 50_000, 26_400)
    waves = [(noise(n, seed=n) * 32767 / (1 + k)).astype(np.int16) for k, n in enumerate(lengths)]
    labels = []
    for number, samples in enumerate(lengths):
        frames = samples // FRAME
        phoneme = np.repeat(np.arange(1, 2 + frames // 4), 4)[:frames].astype(np.int64) % 20
        f0 = np.linspace(80 + 40 * number, 160 + 40 * number, frames, dtype=np.float32)
        f0[::5] = 0
        labels.append((phoneme, f0))
    utterances = [{"id": f"u{n}", "speaker": f"s{n % 3}"} for n in range(len(lengths))]
    return Corpus(utterances, waves, labels, CPU)


def lively(module: nn.Module) -> nn.Module:
    """With outputs that differ: a new network says about the same of everything."""
    torch.manual_seed(0)
    module.to_digits.weight.data.mul_(10)
    return rounded(module).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, SpeechTokenizer, speaker_encoder.SpeakerEncoder]:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    tokenizer, encoder = lively(SpeechTokenizer()), rounded(speaker_encoder.SpeakerEncoder()).eval()
    speech_tokenizer.export_tokenizer(tokenizer, folder / speech_tokenizer.FILE_NAME)
    speaker_encoder.export_encoder(encoder, folder / OnnxSpeakerEncoder.FILE_NAME)
    return folder, tokenizer, encoder


def test_batched_features_are_those_of_the_server():
    wave = noise(2, 24_123)
    for rate in (24_000, 22_050):
        expected = np.stack([audio.resample(row, rate, 16_000) for row in wave])
        np.testing.assert_allclose(resample(torch.from_numpy(wave), rate).numpy(), expected, atol=1e-6)
    speech = noise(2, 16_000)
    found = fbanks(torch.from_numpy(speech))
    expected = np.stack([kaldi_fbank(row) for row in speech])
    np.testing.assert_allclose((found - found.mean(1, keepdim=True)).numpy(), expected, atol=2e-3)


def test_crops_lie_where_they_should(corpus):
    torch.manual_seed(0)
    samples, margin = 12_000, 480
    crops = Crops(corpus, torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0]), samples, margin)
    index, begin = crops.draw(2000)
    assert set(index.tolist()) == {0, 2, 3}
    assert (begin >= -margin).all() and (begin + samples <= corpus.samples[index] + margin).all()
    assert abs((index == 3).float().mean() - 0.5) < 0.05


def test_disturbed_speech_is_still_speech():
    torch.manual_seed(0)
    wave = torch.from_numpy(noise(4, 16_000))
    for changed in (disturbed(wave), tilted(wave)):
        assert changed.shape == wave.shape
        likeness = torch.cosine_similarity(changed, wave)
        assert (likeness > 0.9).all() and (likeness < 1.0).any()


def test_marks_that_nobody_hears_are_no_phonemes():
    ids = {sign: 10 + n for n, sign in enumerate(';:,.!?—…"()“”')} | {" ": 2, "ˈ": 3, "ˌ": 4, "a": 5, "b": 6}
    told = "_ˈˈaa bbˌa, ˈb. _"
    heard = "_aaaabbbaa__bb___"
    spoken = torch.tensor([ids.get(sign, 0) for sign in told])
    found = speech_tokenizer.audible(spoken, ids)
    assert "".join({0: "_", 5: "a", 6: "b"}[n] for n in found.tolist()) == heard


@pytest.mark.parametrize(("frames", "codes"), [(1, 1), (4, 1), (5, 2), (8, 2), (97, 25)])
def test_a_code_comes_for_every_four_frames(frames, codes):
    with torch.no_grad():
        assert SpeechTokenizer()(torch.randn(1, 128, frames)).shape[1] == codes


def test_padding_changes_nothing():
    tokenizer, encoder = lively(SpeechTokenizer()), speaker_encoder.SpeakerEncoder().eval()
    frames = torch.tensor([41, 60, 98])
    with torch.no_grad():
        mel, fbank = torch.randn(3, 128, 98), torch.randn(3, 98, 80)
        digits, embeddings = tokenizer(mel, frames), encoder(fbank, frames)
        for row, length in enumerate(frames.tolist()):
            alone = tokenizer(mel[row : row + 1, :, :length])[0]
            torch.testing.assert_close(digits[row, : len(alone)], alone, atol=1e-5, rtol=0)
            alone = encoder(fbank[row : row + 1, :length])[0]
            torch.testing.assert_close(embeddings[row], alone, atol=1e-5, rtol=1e-4)


def test_codes_are_numbered_by_their_digits():
    tokenizer = SpeechTokenizer()
    digits = torch.tensor([[-0.9, -0.8, -0.7, -1.0, -0.6, -0.9], [0.9, 0.1, -0.9, 0.2, -0.3, 0.8]])
    assert tokenizer.ids(digits).tolist() == [0, 2 + 1 * 3 + 0 + 27 + 81 + 2 * 243]


def test_pitch_is_to_the_speaker_and_loudness_to_the_utterance(corpus):
    labelled = Labelled(corpus, MEL, {sign: 100 + n for n, sign in enumerate(';:,.!?—…"()“” ˈˌ')})
    everything = torch.arange(len(corpus))
    wave = corpus.crops(everything, torch.zeros_like(everything), 24_000)
    targets = labelled.targets(everything, torch.zeros_like(everything), wave)
    assert targets.mel.shape == (5, 50, 80) and targets.phoneme.shape == (5, 50)
    assert targets.loudness.mean(1).abs().max() < 0.1
    for speaker in range(3):
        rows = corpus.speaker.repeat_interleave(corpus.frames) == speaker
        f0 = corpus.labels.f0[rows]
        mean = f0[f0 > 60].log().mean()
        torch.testing.assert_close(labelled._pitch[speaker], mean)
    # A crop that begins a frame later has the same targets, a frame earlier.
    later = corpus.crops(everything, torch.full_like(everything, FRAME), 24_000 - FRAME)
    moved = labelled.targets(everything, torch.full_like(everything, FRAME), later)
    torch.testing.assert_close(moved.phoneme, targets.phoneme[:, 1:])
    torch.testing.assert_close(moved.pitch, targets.pitch[:, 1:])
    torch.testing.assert_close(moved.loudness, targets.loudness[:, 1:])


def test_the_tokenizer_learns_a_batch():
    torch.manual_seed(0)
    taught = TaughtTokenizer(phonemes=12, speakers=3, mels=20)
    learner = Learner(taught, 2e-3)
    learner.set_rate(1.0)
    phoneme = torch.randint(0, 12, (2, 8)).repeat_interleave(2, 1)
    mel = torch.randn(12, 128)[phoneme].repeat_interleave(2, 1).transpose(1, 2)
    voiced = (phoneme > 5).float()
    targets = Targets(phoneme, phoneme / 6 - 1, voiced, phoneme / 6 - 1, torch.randn(12, 20)[phoneme] - 6)
    history = []
    for _ in range(15):
        found, right = losses(taught, mel, torch.tensor([0, 2]), targets)
        learner.learn(sum(speech_tokenizer.WEIGHTS[name] * loss for name, loss in found.items()))
        history.append({name: float(loss.detach()) for name, loss in found.items()})
    assert right > 0.8
    assert all(history[-1][name] < 0.9 * history[0][name] for name in found), (history[0], history[-1])


def test_the_encoder_learns_a_batch():
    torch.manual_seed(0)
    taught = speaker_encoder.TaughtEncoder(4)
    learner = Learner(taught, 1e-3)
    learner.set_rate(1.0)
    speaker = torch.arange(4).repeat(2)
    fbank = torch.randn(4, 1, 80)[speaker] * torch.randn(8, 60, 1)
    history = []
    for _ in range(10):
        loss, right = speaker_encoder.margin_loss(taught.encoder(fbank), taught.directions, speaker)
        learner.learn(loss)
        history.append(float(loss.detach()))
    assert history[-1] < 0.5 * history[0] and right > 0.8


def test_the_margin_makes_the_right_answer_harder():
    embedding, directions, speaker = torch.randn(6, 192), torch.randn(3, 192), torch.arange(6) % 3
    loss, _ = speaker_encoder.margin_loss(embedding, directions, speaker)
    cosine = nn.functional.normalize(embedding) @ nn.functional.normalize(directions).T
    assert loss > nn.functional.cross_entropy(speaker_encoder.SCALE * cosine, speaker)


def test_equal_error_rate():
    same, different = torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0.1, 0.0, -0.1, 0.75])
    assert speaker_encoder.equal_error_rate(same, different) == pytest.approx(0.25)
    assert speaker_encoder.equal_error_rate(same[:3], different[:3]) == 0.0


def test_the_exported_files_are_small_and_what_the_server_takes(exported):
    folder, tokenizer, encoder = exported
    assert (folder / speech_tokenizer.FILE_NAME).stat().st_size < 5e6
    assert (folder / OnnxSpeakerEncoder.FILE_NAME).stat().st_size < 2.2e6
    served_tokenizer, served_encoder = OnnxSpeechTokenizer(folder), OnnxSpeakerEncoder(folder)
    with torch.no_grad():
        for samples in (16_000, 23_456):
            speech = noise(samples, seed=samples)
            mel = speech_tokenizer.whisper_log_mels(torch.from_numpy(speech)[None])
            expected = tokenizer.ids(tokenizer(mel))[0].numpy()
            found = served_tokenizer(speech)
            assert found.shape == expected.shape and len(set(found.tolist())) > 3
            assert (found == expected).mean() > 0.95
            fbank = torch.from_numpy(kaldi_fbank(speech))[None]
            np.testing.assert_allclose(served_encoder(speech), encoder(fbank)[0].numpy(), atol=1e-4)


def test_the_corpus_is_coded_as_the_server_does(exported, corpus, tmp_path, monkeypatch):
    folder, tokenizer, encoder = exported
    monkeypatch.setattr(encode, "IN_ROOMS", 0.5)
    config, _, _ = write_config(tmp_path)
    codes = encode.Coder(tokenizer, encoder, config).write(tmp_path, "00003.npz", corpus)
    assert set(codes) == {utterance["id"] for utterance in corpus.utterances}
    for utterance, samples in zip(corpus.utterances, corpus.samples.tolist(), strict=True):
        assert len(codes[utterance["id"]].speech_token) == samples // FRAME // 2
    same, tokens, cosine = encode.difference_to_served(corpus, codes, folder)
    assert same > 0.95 * tokens and cosine > 0.999

    write_codes(codes_file(tmp_path, "00001.npz"), {"other": Code(np.arange(3), np.zeros(192, np.float32))})
    stored = read_codes(tmp_path)
    assert stored.keys() == codes.keys() | {"other"}
    assert stored["other"].speech_token.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(stored["u3"].speech_token, codes["u3"].speech_token)
    in_rooms = read_rooms(tmp_path)
    assert 0 < len(in_rooms) < len(codes)
    for name, room in in_rooms.items():
        assert room.mel.shape == (len(room.code.speech_token), 2, 80)
        assert room.mel.dtype == np.float16 and np.isfinite(room.mel).all()
        assert len(room.code.speech_token) >= len(codes[name].speech_token)


def test_only_shards_without_codes_are_coded_each_in_one_part(tmp_path):
    for folder, numbers in (("speech", range(5)), ("codes", (1, 4))):
        (tmp_path / folder).mkdir()
        for number in numbers:
            (tmp_path / folder / f"{number:05}.npz").touch()
    assert [[int(f.stem) for f in encode.missing(tmp_path, part, 2)] for part in range(2)] == [[0, 2], [3]]
    assert encode.part("1/2") == (1, 2)
    for wrong in ("2/2", "1", "a/2"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not like"):
            encode.part(wrong)


def test_a_room_changes_a_recording_and_it_is_still_that(monkeypatch):
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    wave = torch.sin(2 * torch.pi * 440 * time) * 0.1
    for seed in range(6):
        found = in_a_room(wave, np.random.default_rng(seed))
        assert torch.equal(found, in_a_room(wave, np.random.default_rng(seed)))
        assert len(wave) <= len(found) <= len(wave) + 2 * rooms.PAUSE * SAMPLE_RATE
        assert rooms.PEAK[0] * 0.99 <= float(found.abs().max()) <= rooms.PEAK[1] * 1.01
        assert float(torch.fft.rfft(found).abs().argmax()) * SAMPLE_RATE / len(found) == pytest.approx(
            440, abs=2
        )
    # A microphone that is dull, and nothing else.
    for name in ("PAUSED", "REVERBERANT", "NOISY", "THIN", "TILT"):
        monkeypatch.setattr(rooms, name, 0.0)
    monkeypatch.setattr(rooms, "DULL", 1.0)
    hiss = torch.from_numpy(noise(SAMPLE_RATE))
    found = in_a_room(hiss, np.random.default_rng(0))
    power = torch.fft.rfft(found).abs().square() / torch.fft.rfft(hiss).abs().square()
    assert float(power[:3000].mean()) > 20 * float(power[11_000:].mean())


def test_shards_are_read_by_their_split(tmp_path):
    """As generate.py writes them."""
    (tmp_path / "speech").mkdir()
    known = {f"u{n}": {"id": f"u{n}", "phonemes": "ab", "speaker": f"s{n % 2}"} for n in (0, 1, 3)}
    waves = [np.full(2000 + 480 * n, n, np.int16) for n in range(4)]
    for number in range(2):
        own = range(2 * number, 2 * number + 2)
        np.savez(
            tmp_path / "speech" / f"{number:05}.npz",
            id=[f"u{n}" for n in own],
            wave=np.concatenate([waves[n] for n in own]),
            samples=[len(waves[n]) for n in own],
            durations=np.full(8, 0.025, np.float32),
            phonemes=[4, 4],
            f0=np.arange(6, dtype=np.float32),
            steps=[3, 3],
        )
    found = Corpus.read(speech_files(tmp_path), known, {"a": 5, "b": 6}, CPU)
    assert [utterance["id"] for utterance in found.utterances] == ["u0", "u1", "u3"]
    for wave, number in zip(found.waves(), (0, 1, 3), strict=True):
        assert torch.equal(wave, torch.from_numpy(waves[number]).float() / 32768)
    assert found.labels.phoneme[:3].tolist() == [6, 0, 0]  # spoken LATE before the durations say
    assert set(found.labels.f0[-7:].tolist()) == {3.0, 4.0, 5.0}
    assert len(Corpus.read(speech_files(tmp_path), {}, {}, CPU)) == 0
