"""Speech tokens to waveform: the golden streams, resumed streams, batches, chunk boundaries, noise."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from light_tts.common.transfer import Download
from light_tts.engine.speech import causal_vocoding, faded_vocoding
from light_tts.engine.speech.chunk_planner import Chunk, ChunkPlanner
from light_tts.engine.speech.token2wav import Token2Wav, to_pcm16
from light_tts.engine.speech.work_item import SpeechState, Voice, WorkItem
from light_tts.tools.parity import Golden
from light_tts.tools.parity.token2wav import golden_voice, load

FAMILIES = {2: Golden(Path("test/golden/cosyvoice2")), 3: Golden(Path("test/golden/cosyvoice3"))}
TOKENS: list[int] = FAMILIES[2].arrays("token2wav.npz")["token"].tolist() * 3
SCHEDULES = {"fixed": 25, "grow": 100, "grow_masked": 100}


MODELS = [(2, "fixed"), (2, "grow"), (2, "grow_masked"), (3, "fixed")]


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: f"{param[0]}-{param[1]}")
def family_and_schedule(request) -> tuple[int, str]:
    return request.param


@pytest.fixture(scope="module")
def golden(family_and_schedule) -> Golden:
    return FAMILIES[family_and_schedule[0]]


@pytest.fixture(scope="module")
def schedule(family_and_schedule) -> str:
    return family_and_schedule[1]


@pytest.fixture(scope="module")
def model(golden, schedule) -> Token2Wav:
    """With few steps, as nearly all tests compare it with itself."""
    return load(golden, full_last_chunk=schedule == "grow", n_timesteps=2)


@pytest.fixture(scope="module")
def voice(golden) -> Voice:
    return golden_voice(golden)


def cut(schedule: str, total: int, prompt: int = 98, first_hop: int | None = None) -> list[Chunk]:
    planner, chunks = ChunkPlanner(prompt, 25, 3, SCHEDULES[schedule], first_hop), []
    while chunk := planner.next_chunk(total, finished=True):
        chunks.append(chunk)
    return chunks


def speak(
    model: Token2Wav, state: SpeechState, chunks: list[Chunk], tokens: list[int] = TOKENS
) -> list[np.ndarray]:
    return [model.speak([WorkItem(state, tokens, chunk, stream=True)])[0] for chunk in chunks]


def replayed(model: Token2Wav, chunks: list[Chunk], delivered: int) -> list[Chunk]:
    """Return the chunks to speak again in order to continue after the first `delivered` ones."""
    return chunks[0 if model.replayed is None else max(0, delivered - model.replayed) : delivered]


def test_stream_is_the_golden_one(voice, golden, schedule):
    arrays = golden.arrays("token2wav.npz")
    expected = arrays.get(f"{schedule}_hop_wav")
    if expected is None:
        pytest.skip("not a schedule of the goldens")
    model = load(golden, full_last_chunk=schedule == "grow")
    state = SpeechState(voice, seed=None)
    wave = np.concatenate(speak(model, state, cut(schedule, 120), arrays["token"].tolist()))
    np.testing.assert_allclose(wave, expected[0], atol=1e-2)
    assert np.abs(wave - expected[0]).mean() < 1e-3
    assert state.tail is None and state.causal is None


def test_only_the_samples_that_a_client_hears_first_are_urgent(model, voice, schedule, monkeypatch):
    noted: list[bool] = []

    class Noted(Download):
        def __init__(self, tensor: torch.Tensor, urgent: bool) -> None:
            noted.append(urgent)
            super().__init__(tensor, urgent)

    for module in (causal_vocoding, faded_vocoding):
        monkeypatch.setattr(module, "Download", Noted)
    first, second, *_ = cut(schedule, 120)
    for part in (0, 1):
        speak(model, SpeechState(voice, seed=1, part=part), [first, second])
    model.speak([WorkItem(SpeechState(voice, seed=1), TOKENS, Chunk(0, 20, 20, True), stream=False)])
    assert noted == [True, False, False, False, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_chunk_mask_frames_do_not_depend_on_the_lengths_of_chunks(family):
    model = load(FAMILIES[family], full_last_chunk=False, n_timesteps=2)
    voice = golden_voice(FAMILIES[family])

    def mel(schedule: str) -> torch.Tensor:
        state = SpeechState(voice, seed=None)
        chunks = cut(schedule, 240)
        items = [WorkItem(state, TOKENS[:240], chunk, stream=True) for chunk in chunks]
        return torch.cat([model._mels([item])[0] for item in items], dim=1)

    torch.testing.assert_close(mel("grow_masked"), mel("fixed"), rtol=0, atol=1e-4)


def test_stream_resumed_at_any_chunk_is_bit_equal(model, voice, schedule):
    chunks = cut(schedule, 90 if schedule == "fixed" else 190)
    undisturbed = speak(model, SpeechState(voice, seed=7, part=1), chunks)
    assert len(chunks) > (model.replayed or 0) + 1
    for delivered in range(1, len(chunks)):
        state = SpeechState(voice, seed=7, part=1)
        speak(model, state, replayed(model, chunks, delivered))
        for got, expected in zip(
            speak(model, state, chunks[delivered:]), undisturbed[delivered:], strict=True
        ):
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("total", [1, 27, 28, 29, 30, 31, 55])
def test_every_token_is_heard_once(model, golden, schedule, total, prompt):
    voice = golden_voice(golden, prompt)
    waves = speak(model, SpeechState(voice, seed=1), cut(schedule, total, len(voice.speech_token)))
    assert sum(map(len, waves)) == total * 960


def test_batch_equals_single_runs(model, voice, golden, schedule):
    """Streams at different positions, with and without a prompt, and a complete response, in one batch."""
    voices = [voice, golden_voice(golden, prompt=False), voice, voice, voice]
    plans = [
        cut(schedule, total, len(v.speech_token)) for v, total in zip(voices, (60, 35, 90, 20), strict=False)
    ]
    plans.append([Chunk(0, 45, 45, True)])

    def item(row: int, state: SpeechState, chunk: Chunk) -> WorkItem:
        return WorkItem(state, TOKENS[row:], chunk, stream=row < 4)

    def states() -> list[SpeechState]:
        return [SpeechState(v, seed=row, speed=0.9 if row == 4 else 1.0) for row, v in enumerate(voices)]

    alone = [
        [model.speak([item(row, state, chunk)])[0] for chunk in plan]
        for row, (state, plan) in enumerate(zip(states(), plans, strict=True))
    ]
    together = states()
    for turn in range(max(map(len, plans))):
        rows = [row for row, plan in enumerate(plans) if turn < len(plan)]
        waves = model.speak([item(row, together[row], plans[row][turn]) for row in rows])
        for row, wave in zip(rows, waves, strict=True):
            np.testing.assert_allclose(wave, alone[row][turn], atol=2e-3)


@pytest.fixture(scope="module")
def usual(model, voice, schedule) -> np.ndarray:
    """A stream of 130 tokens whose first chunk is as long as others."""
    return np.concatenate(speak(model, SpeechState(voice, seed=3), cut(schedule, 130)))


@pytest.mark.parametrize("first_hop", [5, 20])
def test_a_short_first_chunk_changes_three_chunks_and_nothing_else(model, voice, usual, schedule, first_hop):
    """Its frames see less of what follows, the vocoder's source begins elsewhere; then all is as ever, but
    for the phase of a causal vocoder. Resumed behind its first chunks it goes on bit for bit, too."""
    chunks = cut(schedule, 130, first_hop=first_hop)
    waves = speak(model, SpeechState(voice, seed=3), chunks)
    assert len(waves[0]) == first_hop * 960 - model.held_back
    changed = sum(map(len, waves[:3]))
    assert len(chunks) > 3
    if model.replayed is None:
        assert sum(map(len, waves)) == len(usual)
    else:
        assert np.array_equal(np.concatenate(waves)[changed:], usual[changed:])
    for delivered in (2, 3):
        resumed = SpeechState(voice, seed=3)
        speak(model, resumed, replayed(model, chunks, delivered))
        assert np.array_equal(speak(model, resumed, chunks[delivered:])[0], waves[delivered])


def test_no_click_at_chunk_borders(model, voice, schedule):
    """Where a chunk ends, the next begins or a cross-fade ends, steps and kinks are no larger than elsewhere
    in the signal."""
    chunks = cut(schedule, 200 if schedule == "fixed" else 330)
    waves = speak(model, SpeechState(voice, seed=3), chunks)
    wave = np.concatenate(waves)
    borders = np.cumsum([len(chunk) for chunk in waves])[:-1]
    for order in (1, 2):
        jumps = np.abs(np.diff(wave, n=order))
        near = np.zeros(len(jumps), bool)
        for border in (*borders, *(borders + model.held_back)):
            near[border - 3 : border + 3] = True
        assert jumps[near].max() <= np.quantile(jumps[~near], 0.9999)
        assert jumps[near].mean() <= 1.5 * jumps[~near].mean()


def test_noise_depends_on_seed_and_part_alone(model, voice, schedule):
    def wave(seed: int | None, part: int) -> np.ndarray:
        return np.concatenate(speak(model, SpeechState(voice, seed, part), cut(schedule, 40)))

    first = wave(5, 0)
    assert np.array_equal(wave(5, 0), first)
    assert not np.array_equal(wave(5, 1), first)
    assert not np.array_equal(wave(6, 0), first)
    assert np.abs(wave(None, 0) - first).max() < 0.5


def test_a_failed_batch_changes_no_state(model, voice, monkeypatch):
    state = SpeechState(voice, seed=1)
    first, second, *_ = cut("fixed", 90)
    speak(model, state, [first])
    before = dataclasses.replace(state)
    with monkeypatch.context() as broken:
        broken.setattr(model._vocoder, "speak", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            speak(model, state, [second])
    assert state.tail is before.tail and state.causal is before.causal


def test_a_final_chunk_without_tokens_is_what_was_held_back(model, voice):
    """Also in a batch with others."""
    first, second, *_ = cut("fixed", 90)
    end = Chunk(first.end, first.end, first.end, final=True)
    nothing = WorkItem(SpeechState(voice, seed=1), [], Chunk(0, 0, 0, final=True), stream=True)
    ending, other = SpeechState(voice, seed=1), SpeechState(voice, seed=2)
    begun = [speak(model, state, [first])[0] for state in (ending, other)]
    waves = model.speak(
        [WorkItem(ending, TOKENS, end, stream=True), nothing, WorkItem(other, TOKENS, second, stream=True)]
    )
    assert [len(wave) for wave in begun] == [first.end * 960 - model.held_back] * 2
    assert [len(wave) for wave in waves] == [model.held_back, 0, (second.end - second.start) * 960]
    alone = speak(model, SpeechState(voice, seed=2), [first, second])
    np.testing.assert_allclose(waves[2], alone[1], atol=2e-3)


def test_nothing_to_say_is_no_sample(model, voice):
    item = WorkItem(SpeechState(voice, seed=1), [], Chunk(0, 0, 0, True), stream=True)
    assert len(model.speak([item])[0]) == 0


def test_pcm_is_cut_toward_zero():
    wave = np.array([0.99, -0.99, 1.9 / 32768, -1.9 / 32768, 0.0], np.float32)
    assert to_pcm16(wave).tolist() == [32440, -32440, 1, -1, 0]


def test_voice_owns_its_tensors():
    """A prompt's shared memory may be unmapped or read-only."""
    voice, given = golden_voice(FAMILIES[2]), FAMILIES[2].arrays("token2wav.npz")["prompt_feat"]
    assert voice.speech_token.dtype == np.int32 and voice.mel.shape == (196, 80)
    assert not np.shares_memory(voice.mel.numpy(), given)
