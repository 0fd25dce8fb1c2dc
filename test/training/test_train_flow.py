"""Training of the flow: what its items are made of, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from light_tts.models.flow.flow import Flow
from light_tts.models.frontend.features import flow_mel
from light_tts.tools.tiny_checkpoint import SIZES
from training import checkpoint
from training.checkpoint import checkpoint_folder, training_file, write_config
from training.codec.codes import Code, Room
from training.codec.mels import token_mel, token_mels
from training.corpus.corpus import Corpus
from training.flow import items as flow_items
from training.flow.flow_matching import evaluate, export, flow_losses, initialise, mel_statistics
from training.flow.items import Choice, PairedSpeech, misheard
from training.loop import Learner

TOKENS, SPEAKERS = (20, 70, 60, 30), ("anna", "bert", "anna", "anna")
ROW = 64


@pytest.fixture(scope="module")
def speech() -> PairedSpeech:
    """Its mel says where it comes from: recording 10, 11 ... and the token's place."""
    draw = np.random.default_rng(0)
    codes, mels = [], []
    for number, size in enumerate(TOKENS):
        codes.append(Code(draw.integers(0, 729, size + 2), np.full(192, 1.0 + number, np.float32)))
        mel = torch.zeros(size, 2, 80)
        mel[..., 0], mel[..., 1], mel[:, 1, 2] = number + 10, torch.arange(size)[:, None], 1
        mels.append(mel.half())
    return PairedSpeech(codes, mels, SPEAKERS, ROW)


def test_the_prompt_is_another_recording_of_the_speaker(speech):
    draw = np.random.default_rng(0)
    recordings = np.tile(np.arange(len(TOKENS)), 50)
    others = speech.other(recordings, draw)
    assert {(int(a), int(b)) for a, b in zip(recordings, others, strict=True)} == {
        (0, 2), (0, 3), (2, 0), (2, 3), (3, 0), (3, 2), (1, 1),
    }  # fmt: skip


def test_an_item_is_the_end_of_one_recording_and_the_beginning_of_another(speech):
    start = np.cumsum(TOKENS) - TOKENS
    choice = Choice(
        first=start[0] + TOKENS[0] - 8,
        first_size=8,
        second=start[2],
        second_size=50,
        known=10,
        embedding=0,
        complete=0,
        streaming=1,
    )
    items = speech.items(torch.tensor([[int(value)] for value in choice]))
    source, place, odd = items.mel[0, :3, : 2 * 58]
    assert source.tolist() == [10] * 16 + [12] * 100
    assert place.tolist() == [n // 2 for n in [*range(24, 40), *range(100)]]
    assert odd.tolist() == [0, 1] * 58
    token = torch.cat([speech.recording(0)[0][-8:], speech.recording(2)[0][:50]])
    assert torch.equal(items.token[0, :58], token)
    assert items.length.tolist() == [58]
    assert torch.equal(items.known[..., :20], items.mel[..., :20]) and not items.known[..., 20:].any()
    assert (items.complete.tolist(), items.streaming.tolist()) == ([False], [True])


def test_what_is_drawn_fits_and_is_of_one_speaker(speech):
    for chosen in (speech.draw(64, np.random.default_rng(seed)) for seed in range(4)):
        items, choice = speech.items(chosen), Choice(*chosen)
        assert int(items.length.max()) <= ROW
        assert bool((choice.known <= items.length).all())
        for row, size in enumerate(items.length):
            recordings = {int(number) - 10 for number in items.mel[row, 0, : 2 * size].unique()}
            assert len({SPEAKERS[number] for number in recordings}) == 1
            assert bool(choice.complete[row]) == (
                int(choice.second_size[row]) in TOKENS
                and float(items.mel[row, 1, 2 * size - 1])
                == TOKENS[int(items.mel[row, 0, 2 * size - 1]) - 10] - 1
            )


def test_the_mel_of_a_recording_is_the_servers(tmp_path):
    config, _, _ = write_config(tmp_path)
    wave = np.random.default_rng(0).standard_normal(24_000).astype(np.float32) * 0.1
    mel = token_mel(torch.from_numpy(wave), 20, config)
    assert mel.shape == (20, 2, 80)
    np.testing.assert_allclose(mel.flatten(0, 1), flow_mel(wave, config.mel)[:40], atol=1e-5)
    assert len(token_mel(torch.from_numpy(wave), 99, config)) == 25


def test_the_mels_of_many_recordings_are_those_of_each(tmp_path):
    config, _, _ = write_config(tmp_path)
    draw = np.random.default_rng(0)
    sizes = (24_000, 9_999, 30_001, 24_479)
    waves = [(draw.standard_normal(n) * 3000).astype(np.int16) for n in sizes]
    labels = [(np.zeros(n // 480, np.int64), np.zeros(n // 480, np.float32)) for n in sizes]
    corpus = Corpus([{"speaker": "anna"}] * 4, waves, labels, torch.device("cpu"))
    numbers, tokens = [3, 0, 1], [99, 20, 10]
    for mel, number, count in zip(token_mels(corpus, numbers, tokens, config), numbers, tokens, strict=True):
        expected = token_mel(torch.from_numpy(waves[number]).float() / 32768, count, config)
        torch.testing.assert_close(mel.float(), expected, atol=4e-3, rtol=0)


def test_a_prompt_from_a_room_is_given_whole_and_what_follows_is_clean(speech, monkeypatch):
    """The mel of a room says 90 and more."""
    rooms = {}
    for number in (0, 1, 3):
        mel = np.zeros((40, 2, 80), np.float16)
        mel[..., 0] = 90 + number
        rooms[number] = Room(Code(np.full(40, number), np.full(192, 1.0)), mel)
    codes = [Code(speech.recording(n)[0].numpy(), np.full(192, 1.0 + n)) for n in range(4)]
    mels = [speech.recording(n)[1].half().unflatten(0, (-1, 2)) for n in range(4)]
    disturbed = PairedSpeech(codes, mels, SPEAKERS, ROW, rooms)
    assert len(disturbed) == 4 and len(disturbed.embedding) == 4 + 3 + 2
    monkeypatch.setattr(flow_items, "IN_ROOM", 1.0)
    draw, seen = np.random.default_rng(0), set()
    for _ in range(4):
        chosen = disturbed.draw(64, draw)
        items, choice = disturbed.items(chosen), Choice(*chosen)
        for row in range(64):
            first, second = int(choice.first_size[row]), int(choice.second_size[row])
            prompt, spoken = (
                items.mel[row, 0, : 2 * first],
                items.mel[row, 0, 2 * first : 2 * (first + second)],
            )
            assert bool((spoken < 20).all())
            if first and float(prompt[0]) >= 90:
                room, clean = int(prompt[0]) - 90, int(spoken[0]) - 10
                assert SPEAKERS[room] == SPEAKERS[clean] and room != clean
                assert int(choice.known[row]) == first
                assert int(choice.embedding[row]) == 4 + (0, 1, 3).index(room)
                seen.add((room, clean))
    assert seen == {(0, 2), (0, 3), (3, 0), (3, 2)}  # the only recording of bert has none but its own


def test_misheard_tokens_are_wrong_in_one_digit(monkeypatch):
    monkeypatch.setattr(flow_items, "MISHEARD", 0.5)
    monkeypatch.setattr(flow_items, "WRONG", 0.2)
    torch.manual_seed(0)
    places = 3 ** torch.arange(6)
    token = torch.randint(0, 729, (200, 100))
    found = misheard(token, places)
    assert int(found.min()) >= 0 and int(found.max()) < 729
    digits, others = (value[..., None] // places % 3 for value in (token, found))
    wrong = (digits != others).sum(-1)
    assert int(wrong.max()) == 1
    assert 0.03 < float(wrong.float().mean()) < 0.07
    assert 60 < int((wrong.sum(1) == 0).sum()) < 140


def test_it_learns_and_the_exported_flow_does_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint, "MINI", replace(SIZES["tiny"], estimator_channels=96, estimator_mid_blocks=1)
    )
    torch.manual_seed(0)
    config, _, shapes = write_config(tmp_path)
    draw = np.random.default_rng(0)
    spectra = draw.standard_normal((729, 80)).astype(np.float32) * 2 - 6
    codes = [Code(draw.integers(0, 5, 12), draw.standard_normal(192).astype(np.float32)) for _ in range(4)]
    mels = [torch.from_numpy(spectra[code.speech_token])[:, None].repeat(1, 2, 1).half() for code in codes]
    speech = PairedSpeech(codes, mels, ["anna"] * 4, 16)
    flow = Flow(config.flow, shapes)
    mean, variance = mel_statistics(speech)
    initialise(flow, mean)

    def measured(model: Flow) -> dict[str, float]:
        parts = (part.rsplit(" ", 1) for part in evaluate(model, speech, variance).split(", "))
        return {name: float(value) for name, value in parts}

    before = measured(flow)
    learner = Learner(flow, 1e-3, average=0.8)
    learner.set_rate(1.0)
    for _ in range(60):
        losses = flow_losses(flow, speech.items(speech.draw(4, draw)), variance)
        learner.learn(losses["velocity"] + losses["guess"])

    torch.save({"flow": learner.state()}, training_file(tmp_path, "flow"))
    state = torch.load(export(tmp_path))
    assert all(value.dtype == torch.float16 for value in state.values())
    exported = Flow.from_checkpoint(checkpoint_folder(tmp_path), config, torch.device("cpu"))
    assert next(exported.parameters()).dtype == torch.float32
    flow.load_state_dict(learner.state()["average"])
    own, read = measured(flow), measured(exported)
    assert own == pytest.approx(read, rel=0.02)
    assert own.keys() == {"velocity", "guess", "mel error whole", "mel error in chunks"}
    assert all(own[name] < 0.85 * before[name] for name in own)
    assert own["guess"] < 0.3 * before["guess"]
