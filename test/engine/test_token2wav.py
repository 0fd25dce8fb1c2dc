"""Speech tokens to waveform: the golden streams, resumed streams, batches, chunk boundaries, noise."""

from pathlib import Path

import numpy as np
import pytest
import torch

from light_tts.engine.speech.chunk_planner import Chunk, ChunkPlanner
from light_tts.engine.speech.token2wav import (
    REPLAYED_CHUNKS,
    SpeechState,
    Token2Wav,
    Voice,
    WorkItem,
    to_pcm16,
)
from light_tts.tools.parity import Golden
from light_tts.tools.parity.token2wav import golden_voice, load

GOLDEN = Golden(Path("test/golden/cosyvoice2"))
ARRAYS = GOLDEN.arrays("token2wav.npz")
TOKENS: list[int] = ARRAYS["token"].tolist() * 3
SCHEDULES = {"fixed": 25, "grow": 100, "grow_masked": 100}


@pytest.fixture(scope="module", params=SCHEDULES)
def schedule(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(schedule) -> Token2Wav:
    return load(GOLDEN, full_last_chunk=schedule == "grow")


@pytest.fixture(scope="module")
def voice() -> Voice:
    return golden_voice(GOLDEN)


def cut(schedule: str, total: int, prompt: int = 98, first_hop: int | None = None) -> list[Chunk]:
    planner, chunks = ChunkPlanner(prompt, 25, 3, SCHEDULES[schedule], first_hop), []
    while chunk := planner.next_chunk(total, finished=True):
        chunks.append(chunk)
    return chunks


def speak(
    model: Token2Wav, state: SpeechState, chunks: list[Chunk], tokens: list[int] = TOKENS
) -> list[np.ndarray]:
    return [model.speak([WorkItem(state, tokens, chunk, stream=True)])[0] for chunk in chunks]


def test_stream_is_the_golden_one(model, voice, schedule):
    if schedule == "grow_masked":
        pytest.skip("not a schedule of CosyVoice2; see the next test")
    state = SpeechState(voice, seed=None)
    wave = np.concatenate(speak(model, state, cut(schedule, 120)))
    np.testing.assert_allclose(wave, ARRAYS[f"{schedule}_hop_wav"][0], atol=1e-2)
    assert state.tail is None


def test_with_the_chunk_mask_frames_do_not_depend_on_the_lengths_of_chunks(voice):
    model = load(GOLDEN, full_last_chunk=False)

    def mel(schedule: str) -> torch.Tensor:
        state = SpeechState(voice, seed=None)
        chunks = cut(schedule, 240)
        items = [WorkItem(state, TOKENS[:240], chunk, stream=True) for chunk in chunks]
        return torch.cat([model._mels([item])[0] for item in items], dim=1)

    torch.testing.assert_close(mel("grow_masked"), mel("fixed"), rtol=0, atol=1e-4)


def test_stream_resumed_at_any_chunk_is_bit_equal(model, voice, schedule):
    chunks = cut(schedule, 90 if schedule == "fixed" else 190)
    undisturbed = speak(model, SpeechState(voice, seed=7, part=1), chunks)
    assert len(chunks) > REPLAYED_CHUNKS + 1
    for delivered in range(1, len(chunks)):
        state = SpeechState(voice, seed=7, part=1)
        speak(model, state, chunks[max(0, delivered - REPLAYED_CHUNKS) : delivered])
        for got, expected in zip(
            speak(model, state, chunks[delivered:]), undisturbed[delivered:], strict=True
        ):
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("total", [1, 27, 28, 29, 30, 31, 55])
def test_every_token_is_heard_once(model, schedule, total, prompt):
    voice = golden_voice(GOLDEN, prompt)
    waves = speak(model, SpeechState(voice, seed=1), cut(schedule, total, len(voice.speech_token)))
    assert sum(map(len, waves)) == total * 960


def test_batch_equals_single_runs(model, voice, schedule):
    """Streams at different positions, with and without a prompt, and a complete response, in one batch."""
    voices = [voice, golden_voice(GOLDEN, prompt=False), voice, voice, voice]
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
    """Its frames see less of what follows, the vocoder's source begins elsewhere; then all is as ever.
    Resumed behind its first chunks it goes on bit for bit, too."""
    chunks = cut(schedule, 130, first_hop=first_hop)
    waves = speak(model, SpeechState(voice, seed=3), chunks)
    assert len(waves[0]) == first_hop * 960 - model.overlap
    changed = sum(map(len, waves[:3]))
    assert len(chunks) > 3
    assert np.array_equal(np.concatenate(waves)[changed:], usual[changed:])
    resumed = SpeechState(voice, seed=3)
    speak(model, resumed, chunks[:REPLAYED_CHUNKS])
    assert np.array_equal(speak(model, resumed, chunks[REPLAYED_CHUNKS:])[0], waves[REPLAYED_CHUNKS])
    resumed = SpeechState(voice, seed=3)
    speak(model, resumed, chunks[1 : 1 + REPLAYED_CHUNKS])
    assert np.array_equal(speak(model, resumed, chunks[1 + REPLAYED_CHUNKS :])[0], waves[1 + REPLAYED_CHUNKS])


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
        for border in (*borders, *(borders + model.overlap)):
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
    tail = state.tail
    with monkeypatch.context() as broken:
        broken.setattr(model._vocoder, "speak", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            speak(model, state, [second])
    assert state.tail is tail


def test_nothing_to_say_is_no_sample(model, voice):
    item = WorkItem(SpeechState(voice, seed=1), [], Chunk(0, 0, 0, True), stream=True)
    assert len(model.speak([item])[0]) == 0


def test_pcm_is_cut_toward_zero():
    wave = np.array([0.99, -0.99, 1.9 / 32768, -1.9 / 32768, 0.0], np.float32)
    assert to_pcm16(wave).tolist() == [32440, -32440, 1, -1, 0]


def test_voice_owns_its_tensors():
    """A prompt's shared memory may be unmapped or read-only."""
    voice = golden_voice(GOLDEN)
    assert voice.speech_token.dtype == np.int32 and voice.mel.shape == (196, 80)
    assert not np.shares_memory(voice.mel.numpy(), ARRAYS["prompt_feat"])
