"""Special speech ids are configurable: which of them end a part, and which must wait for its minimum
length.
"""

import dataclasses

from light_tts.common.row_state import ALLOWED, BANNED, HELD
from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.sequence import PartRequest
from light_tts.models.checkpoint.config import SpecialIds
from light_tts.models.checkpoint.cosyvoice3_config import COSYVOICE3_IDS
from light_tts.models.llm.speech_lm import SpeechIds

SPECIAL = SpecialIds(count=200, eos=1, fill=3, held=(1, 7))
IDS = SpeechIds(100, 500, SPECIAL)
PART = PartRequest("a/0", 0, 1, IDS, limit=300)


def test_each_special_id_ends_a_part_and_those_held_wait_for_its_least_length():
    for stop in (500, 501, 699):
        sequence = OneShot(PART, [1, 2, 3])
        sequence.accept(499)
        sequence.accept(stop)
        assert sequence.finished and sequence.outputs == [499]
    assert [i for i, ban in enumerate(sequence.bans) if ban == HELD] == [1, 7]
    assert sequence.bans.count(ALLOWED) == 198


def test_a_stream_of_text_may_draw_the_fill_id_until_its_text_has_ended_and_then_the_end():
    sequence = Bistream(PART, mix=(2, 3))
    sequence.append_text([1, 2])
    assert {i: ban for i, ban in enumerate(sequence.bans) if ban != BANNED} == {3: ALLOWED}
    sequence.accept(5)
    sequence.accept(503)
    assert sequence.outputs == [5, 503] and not sequence.ready
    sequence.finish_text()
    assert {i: ban for i, ban in enumerate(sequence.bans) if ban != BANNED} == {1: HELD}
    sequence.accept(501)
    assert sequence.finished and sequence.outputs == [5, 503]


def test_where_a_stream_has_its_text_and_drew_its_speech():
    sequence = Bistream(PART, mix=(2, 3))
    lengths = []
    for text, tokens in (([1, 2], [5, 6, 7, 503]), ([3, 4], [8, 9, 10, 503]), ([7], [])):
        sequence.append_text(text)
        for token in tokens:
            lengths += [len(sequence.inputs)] if token != 503 else []
            sequence.accept(token)
    sequence.finish_text()
    lengths.append(len(sequence.inputs))
    sequence.accept(11)
    assert [sequence.inputs[at] for at in sequence.text] == [1, 2, 3, 4, 7]
    assert sequence.speech == lengths


def test_leading_ids_are_fed_first_and_are_no_text_of_a_block():
    part = dataclasses.replace(PART, prompt_text=[91, 92, 7], prompt_speech=[8, 9], leading=2)
    sequence = Bistream(part, mix=(2, 3))
    assert sequence.inputs == [IDS.sos, 91, 92] and not sequence.ready
    sequence.append_text([1])
    assert sequence.inputs == [IDS.sos, 91, 92, 7, 1, *IDS.spoken([8, 9])] and sequence.ready
    sequence.append_text([2])
    sequence.finish_text()
    assert [sequence.inputs[at] for at in sequence.text] == [1]
    assert sequence.max_outputs == 20 * 3


def test_leading_ids_without_prompt_speech_wait_for_a_block_of_text():
    sequence = Bistream(dataclasses.replace(PART, prompt_text=[91, 92], leading=2), mix=(2, 3))
    sequence.append_text([1])
    assert not sequence.ready
    sequence.append_text([2])
    assert sequence.inputs == [IDS.sos, 91, 92, 1, 2] and sequence.ready


def test_text_too_short_for_a_block_follows_the_leading_ids():
    sequence = Bistream(dataclasses.replace(PART, prompt_text=[91, 92], leading=2), mix=(2, 3))
    sequence.append_text([1])
    sequence.finish_text()
    assert sequence.inputs == [IDS.sos, 91, 92, 1, IDS.task] and sequence.ready


def test_leading_ids_beyond_the_limit_are_an_error():
    sequence = Bistream(dataclasses.replace(PART, prompt_text=[9] * 300, leading=300), mix=(2, 3))
    assert sequence.finished and "max_req_total_len" in sequence.error


def test_marks_are_special_ids_or_have_a_table_of_their_own():
    marks = SpeechIds(100, 500, COSYVOICE3_IDS)
    assert (marks.sos, marks.eos, marks.task, marks.fill) == (600, 501, 602, 503)
    assert (IDS.sos, IDS.task) == (800, 801)
