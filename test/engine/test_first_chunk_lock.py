"""Exclusive GPU use for first chunks: the lock, and when the language model respects it."""

import multiprocessing
import time

import pytest
import torch
from support.llm_requests import bistream, request

from light_tts.engine.llm.delivery import Delivery
from light_tts.engine.llm.llm_yield import HANDOVER_SECONDS, LONGEST, LLMYield
from light_tts.engine.llm.sequence import Sequence
from light_tts.engine.speech.chunk_planner import ChunkPlanner
from light_tts.server.core.first_chunk_lock import FirstChunkLock, choose_first_chunk_lock
from light_tts.server.core.messages import Generate, PartProgress, Raw, SpeechOptions
from light_tts.server.tts_llm.jobs import Speaking

FORK = multiprocessing.get_context("fork")
FILL = 731


# ---------------------------------------------------------------- the lock


def keep(path, kept) -> None:
    FirstChunkLock(path).keep(True)
    kept.set()
    time.sleep(60)


def test_it_is_taken_while_any_process_has_it_and_free_when_that_is_killed(tmp_path):
    ours, theirs = FirstChunkLock(tmp_path / "lock"), FirstChunkLock(tmp_path / "lock")
    kept = FORK.Event()
    holder = FORK.Process(target=keep, args=(tmp_path / "lock", kept))
    holder.start()
    assert kept.wait(20)
    theirs.keep(True)  # it is shared
    assert ours.taken()
    holder.kill()
    holder.join()
    assert ours.taken()
    theirs.keep(False)
    assert not ours.taken() and not ours.taken()
    for end in (ours, theirs, ours):
        end.close()


def test_it_is_kept_once_however_often_that_is_said(tmp_path):
    decode, llm = FirstChunkLock(tmp_path / "lock"), FirstChunkLock(tmp_path / "lock")
    for wanted in (False, True, True, False, False, True):
        decode.keep(wanted)
        assert llm.taken() is wanted
    decode.close()
    assert not llm.taken()
    llm.close()


def test_each_gpu_has_its_own_and_a_cpu_has_none(tmp_path):
    assert choose_first_chunk_lock(tmp_path, torch.device("cpu")) is None
    assert not list(tmp_path.iterdir())
    ends = [choose_first_chunk_lock(tmp_path, torch.device("cuda", index)) for index in (0, 1, 0)]
    ends[0].keep(True)
    assert [end.taken() for end in ends[1:]] == [False, True]
    for end in ends:
        end.close()


# ---------------------------------------------------------------- when steps are held back


class World:
    """A clock, and a decode process with or without a first chunk."""

    def __init__(self) -> None:
        self.now, self.taken = 100.0, False
        self.llm_yield = LLMYield(lambda: self.taken, lambda: self.now)

    def holds(self, urgent: bool = False, coming: bool = False) -> bool:
        return self.llm_yield.holds(urgent, coming)

    def held(self, seconds: float, step: float = 0.01) -> float:
        """Return the fraction of this time in which no step was started; a step takes `step`."""
        begun, end = 0.0, self.now + seconds
        while self.now < end:
            held = self.holds()
            passed = 0.001 if held else step
            begun += 0 if held else passed
            self.now += passed
        return 1 - begun / seconds


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_is_held_back_where_no_first_chunk_is_there(world):
    assert not world.holds() and not world.holds(urgent=True)


def test_steps_wait_for_a_first_chunk_in_work_unless_one_is_urgent(world):
    world.taken = True
    assert world.holds()
    assert not world.holds(urgent=True)
    assert world.holds()
    world.taken = False
    assert not world.holds()


def test_steps_wait_from_the_last_draw_on_until_the_decode_process_has_begun(world):
    assert world.holds(coming=True)
    assert not world.holds(urgent=True, coming=True)
    world.llm_yield.expect()
    assert world.holds()
    world.now += 1.01 * HANDOVER_SECONDS
    assert not world.holds()


def test_a_hold_ends_though_the_first_chunk_does_not(world):
    world.taken = True
    begun = world.now
    while world.holds():
        world.now += 0.001
    assert world.now - begun == pytest.approx(LONGEST, abs=0.002)


def test_first_chunks_without_end_leave_half_of_the_time(world):
    world.taken = True
    assert world.held(10.0) == pytest.approx(0.5, abs=0.03)


def test_after_idle_time_a_hold_may_be_as_long_as_ever(world):
    world.taken = True
    assert world.holds()
    assert not world.holds(urgent=True)  # nothing to hold back: the process sleeps
    world.now += 60.0
    assert world.held(0.9 * LONGEST) == pytest.approx(1.0)


# ---------------------------------------------------------------- which streams are urgent


def speaking(sequence: Sequence, stream: bool = True, part: int = 0, samples: int = 0) -> Speaking:
    generate = Generate(
        job=sequence.job,
        reply_to="",
        part=part,
        parts=9,
        prompt_text_ids=[],
        text_ids=[],
        prompt_speech_token=Raw(b""),
        flow_prompt_tokens=0,
        prompt=None,
        speaker="",
        options=SpeechOptions(seed=0),
        stream=stream,
        bistream=False,
        progress=PartProgress(samples=samples),
    )
    planner = ChunkPlanner(0, hop=15, lookahead=3) if stream else None
    return Speaking(generate, sequence, Delivery(planner, FILL), arrived=0.0)


def draw(sequence: Sequence, tokens: int) -> None:
    """Launch a prefill or a round that samples this many tokens, like the engine."""
    sequence.cached += tokens if sequence.on_device else sequence.pending
    sequence.on_device = True
    sequence.ahead += tokens


def accept(part: Speaking, tokens: int) -> list[int] | None:
    part.sequence.accept_all([1] * tokens)
    return part.delivery.take(part.sequence.outputs, part.sequence.finished)


def test_a_stream_is_urgent_until_the_tokens_of_its_first_chunk_are_being_drawn():
    part = speaking(request(0, min_outputs=40, max_outputs=60))
    assert part.urgent and part.is_first_audio  # it has not been in the model at all
    draw(part.sequence, 1)
    draw(part.sequence, 8)
    assert part.urgent  # 9 of 18
    assert accept(part, 9) is None
    draw(part.sequence, 8)
    assert part.urgent  # 17 of 18
    draw(part.sequence, 8)
    assert not part.urgent and part.is_first_audio
    assert accept(part, 8) is None
    assert not part.urgent and part.is_first_audio
    assert len(accept(part, 8)) == 25
    assert not part.urgent and not part.is_first_audio


def test_a_paused_stream_is_urgent_again():
    part = speaking(request(0, min_outputs=40, max_outputs=60))
    draw(part.sequence, 20)
    accept(part, 20)
    assert not part.urgent
    part.sequence.recall(0)
    assert part.urgent and not part.is_first_audio


def test_an_answer_in_one_piece_is_never_urgent():
    part = speaking(request(0), stream=False)
    assert not part.urgent and not part.is_first_audio


def test_later_parts_and_resumed_ones_break_no_silence():
    assert not speaking(request(0), part=1).is_first_audio
    assert not speaking(request(0), samples=1).is_first_audio


def test_a_bistream_is_urgent_when_its_text_is_there():
    part = speaking(bistream())
    assert not part.urgent
    part.sequence.append_text([5] * 40)
    assert part.urgent
    draw(part.sequence, part.sequence.free_steps)
    assert not part.urgent  # the host must look at the fill id first
