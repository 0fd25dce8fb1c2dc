"""Request state in the HTTP worker: order of audio, repetitions, recovery. No sockets."""

from __future__ import annotations

import numpy as np
import pytest

from light_tts.server.core.channel import Outbox, Peers
from light_tts.server.core.messages import (
    AppendText,
    AudioChunk,
    FinishText,
    PartProgress,
    Prompt,
    Raw,
    Routed,
    SpeechOptions,
    StageDown,
    StageGivenUp,
    StageInfo,
    Synthesize,
    Topology,
)
from light_tts.server.httpserver import recovery
from light_tts.server.httpserver.request import LostAudio, SpeechRequest, WantedSpeech


def make_request(**changes) -> SpeechRequest:
    speech = WantedSpeech(
        style=0, prompt=Prompt(key="05"), options=SpeechOptions(seed=1), text="hello", **changes
    )
    request = SpeechRequest("abc", speech)
    request.submitted = True
    return request


def pcm_of(*samples: int) -> bytes:
    return np.array(samples, np.int16).tobytes()


def chunk(request, part, start, samples, tokens=(), final=False, parts=1, job=None) -> AudioChunk:
    return AudioChunk(
        job=job or request.job,
        part=part,
        parts=parts,
        start=start,
        tokens=list(tokens),
        pcm=Raw(pcm_of(*samples)),
        final=final,
    )


def stages(encode="up", llm="up", decode=("up", "up"), incarnation=0) -> list[StageInfo]:
    states = [
        ("encode", 0, encode),
        ("llm", 0, llm),
        *(("decode", i, state) for i, state in enumerate(decode)),
    ]
    return [
        StageInfo(
            stage=stage, index=index, incarnation=incarnation, address=f"ipc://@{stage}{index}", state=state
        )
        for stage, index, state in states
    ]


def peers_with(**states) -> Peers:
    peers = Peers(Outbox())
    peers.apply(Topology(stages=stages(**states)))
    return peers


def test_chunks_of_one_part_are_passed_on_as_they_come():
    request = make_request()
    assert request.take(chunk(request, 0, 0, [1, 2])) == [pcm_of(1, 2)]
    assert not request.complete
    assert request.take(chunk(request, 0, 2, [3], final=True)) == [pcm_of(3)]
    assert request.complete


def test_audio_of_the_next_part_waits_until_the_part_before_has_ended():
    request = make_request()
    assert request.take(chunk(request, 1, 0, [7], parts=3, final=True)) == []
    assert request.take(chunk(request, 0, 0, [1], parts=3)) == [pcm_of(1)]
    assert request.take(chunk(request, 2, 0, [8], parts=3)) == []
    assert request.take(chunk(request, 0, 1, [2], parts=3, final=True)) == [pcm_of(2), pcm_of(7), pcm_of(8)]
    assert request.take(chunk(request, 2, 1, [9], parts=3, final=True)) == [pcm_of(9)]
    assert request.complete


def test_an_empty_final_chunk_ends_a_part():
    request = make_request()
    request.take(chunk(request, 0, 0, [1, 2]))
    assert request.take(chunk(request, 0, 2, [], final=True)) == []
    assert request.complete


def test_a_repeated_chunk_is_not_heard_twice():
    request = make_request()
    request.take(chunk(request, 0, 0, [1, 2], tokens=[5]))
    assert request.take(chunk(request, 0, 0, [1, 2], tokens=[5])) == []
    assert request.progress() == [PartProgress(tokens=[5], samples=2)]


def test_a_gap_in_the_audio_is_noticed_and_changes_nothing():
    request = make_request()
    request.take(chunk(request, 0, 0, [1, 2], tokens=[5]))
    with pytest.raises(LostAudio):
        request.take(chunk(request, 0, 4, [9], tokens=[6]))
    assert request.progress() == [PartProgress(tokens=[5], samples=2)]


def test_a_changed_number_of_parts_is_noticed():
    request = make_request()
    request.take(chunk(request, 0, 0, [1], parts=2))
    with pytest.raises(LostAudio):
        request.take(chunk(request, 0, 1, [1], parts=3))


def test_audio_of_an_earlier_attempt_is_ignored():
    request = make_request()
    old_job = request.job
    request.start_attempt()
    request.submitted = True
    assert request.take(chunk(request, 0, 0, [1], job=old_job)) == []
    assert request.progress() == []


def test_the_next_attempt_goes_on_where_the_audio_ended():
    request = make_request(stream=True)
    request.take(chunk(request, 0, 0, [1, 2], tokens=[5, 6], parts=3, final=True))
    request.take(chunk(request, 1, 0, [3], tokens=[7], parts=3))
    request.start_attempt()
    (message,) = request.submission("ipc://me")
    assert message == Synthesize(
        job="abc/1",
        reply_to="ipc://me",
        style=0,
        text="hello",
        prompt=request.speech.prompt,
        options=SpeechOptions(seed=1),
        stream=True,
        progress=[
            PartProgress(tokens=[5, 6], samples=2, finished=True),
            PartProgress(tokens=[7], samples=1),
        ],
    )
    request.submitted = True
    assert request.take(chunk(request, 1, 1, [4], tokens=[8], parts=3, final=True)) == [pcm_of(4)]
    assert request.take(chunk(request, 2, 0, [5], parts=3, final=True)) == [pcm_of(5)]
    assert request.complete


def test_audio_held_for_later_survives_a_new_attempt():
    request = make_request()
    request.take(chunk(request, 1, 0, [7], tokens=[1], parts=2, final=True))
    request.start_attempt()
    assert request.progress() == [PartProgress(), PartProgress(tokens=[1], samples=1, finished=True)]
    request.submitted = True
    assert request.take(chunk(request, 0, 0, [1], parts=2, final=True)) == [pcm_of(1), pcm_of(7)]


def test_a_bistream_request_is_submitted_again_with_all_its_text():
    request = make_request(bistream=True, stream=True)
    request.texts += ["one ", "two"]
    request.text_finished = True
    request.start_attempt()
    assert request.submission("ipc://me")[1:] == [
        AppendText(job="abc/1", text="one "),
        AppendText(job="abc/1", text="two"),
        FinishText(job="abc/1"),
    ]


def test_attempts_without_progress_are_counted_and_progress_forgives_them():
    request = make_request()
    request.start_attempt(after_loss=True)
    request.start_attempt(after_loss=True)
    request.start_attempt()
    assert request.fruitless_attempts == 2
    request.submitted = True
    request.take(chunk(request, 0, 0, [1]))
    assert request.fruitless_attempts == 0


def test_the_owner_of_a_prompt_is_a_function_of_its_key():
    assert make_request().encode_index(4) == 1
    by_name = SpeechRequest(
        "x", WantedSpeech(style=0, prompt=Prompt(speaker="anna"), options=SpeechOptions(seed=1))
    )
    again = SpeechRequest(
        "y", WantedSpeech(style=0, prompt=Prompt(speaker="anna"), options=SpeechOptions(seed=2))
    )
    assert by_name.encode_index(7) == again.encode_index(7)


def test_a_dead_llm_takes_every_unfinished_request_of_its_style():
    request = make_request()
    assert recovery.lost_with(request, "llm", 0, 0, encodes=1)
    assert not recovery.lost_with(request, "llm", 1, 0, encodes=1)
    request.take(chunk(request, 0, 0, [1], final=True))
    assert not recovery.lost_with(request, "llm", 0, 0, encodes=1)


def test_a_dead_decode_takes_only_what_was_routed_to_that_incarnation():
    request = make_request()
    assert not recovery.lost_with(request, "decode", 0, 0, encodes=1)
    request.routed = Routed(job=request.job, decode=1, incarnation=2)
    assert recovery.lost_with(request, "decode", 1, 2, encodes=1)
    assert not recovery.lost_with(request, "decode", 1, 1, encodes=1)
    assert not recovery.lost_with(request, "decode", 0, 2, encodes=1)


def test_a_dead_encode_takes_what_it_has_not_certainly_handed_on():
    request = make_request()
    assert recovery.lost_with(request, "encode", 5 % 2, 0, encodes=2)
    assert not recovery.lost_with(request, "encode", 0, 0, encodes=2)
    request.routed = Routed(job=request.job, decode=0, incarnation=0)
    request.take(chunk(request, 0, 0, [1], parts=2))
    assert recovery.lost_with(request, "encode", 1, 0, encodes=2), "part 1 may not have left it"
    request.take(chunk(request, 1, 0, [1], parts=2))
    assert not recovery.lost_with(request, "encode", 1, 0, encodes=2)


def test_a_dead_encode_takes_every_bistream_request_it_serves():
    request = make_request(bistream=True, stream=True)
    request.routed = Routed(job=request.job, decode=0, incarnation=0)
    request.take(chunk(request, 0, 0, [1]))
    assert recovery.lost_with(request, "encode", 0, 0, encodes=1)


def test_a_request_that_waits_for_stages_loses_nothing():
    request = make_request()
    request.start_attempt()
    assert not recovery.lost_with(request, "llm", 0, 0, encodes=1)


def test_news_of_a_route_to_a_dead_process_is_recognised():
    peers = peers_with()
    routed = Routed(job="abc/0", decode=1, incarnation=0)
    assert not recovery.routed_to_dead(routed, peers)
    following = StageInfo(stage="decode", index=1, incarnation=1, address="ipc://@new", state="down")
    peers.apply(StageDown(stage="decode", index=1, incarnation=0, next=following))
    assert recovery.routed_to_dead(routed, peers)
    assert not recovery.routed_to_dead(Routed(job="abc/1", decode=1, incarnation=1), peers)
    peers.apply(StageGivenUp(stage="decode", index=1, reason="died 3 times"))
    assert recovery.routed_to_dead(Routed(job="abc/1", decode=1, incarnation=1), peers)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({}, None),
        ({"encode": "down"}, ""),
        ({"llm": "starting"}, ""),
        ({"decode": ("down", "up")}, None),
        ({"decode": ("failed", "up")}, None),
        ({"decode": ("failed", "down")}, ""),
    ],
)
def test_a_request_waits_only_for_stages_it_needs(states, expected):
    assert recovery.blocking_reason(make_request(), peers_with(**states)) == expected


@pytest.mark.parametrize(
    "states", [{"encode": "failed"}, {"llm": "failed"}, {"decode": ("failed", "failed")}]
)
def test_a_request_that_needs_a_stage_that_was_given_up_can_never_be_served(states):
    assert "given up" in recovery.blocking_reason(make_request(), peers_with(**states))


def test_nothing_can_be_served_before_the_stages_are_known():
    assert recovery.blocking_reason(make_request(), Peers(Outbox())) == ""
