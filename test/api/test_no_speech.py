"""A model that ends without producing speech: the request is retried with another seed, or fails."""

from __future__ import annotations

import pytest
from support.server_process import Server, speak
from support.waiting import eventually
from test_websocket import say, texts

VOICE = {"spk_id": "tiny_spk"}
FREE = {"min_new_tokens": 0, "max_new_tokens": 10}
TEXT = "Hello there, how are you today?"
REASON = "the model produced no speech in two attempts"
SOCKET = "/inference_bistream"


@pytest.fixture
def server(styles_server: Server) -> Server:
    """`ending` always ends at once if it may, `shy` about every other time."""
    return styles_server


def silent_seeds(server: Server, request_ids: dict[str, int]) -> list[int]:
    """Return the seeds of the requests that the log reports as retried."""
    lines = [line for line in server.output.splitlines() if "no speech with seed" in line]
    return [seed for request_id, seed in request_ids.items() if any(request_id in line for line in lines)]


def test_an_answer_without_speech_is_drawn_again_with_the_next_seed(server):
    answers, ids = {}, {}
    with server.client() as client:
        for seed in range(16):
            answers[seed] = speak(client, TEXT, tts_model_name="shy", seed=seed, **VOICE, **FREE)
            ids[answers[seed].headers["x-request-id"]] = seed
        silent = silent_seeds(server, ids)
        spoken = [seed for seed in silent if answers[seed].status_code == 200 and seed < 15]
        assert spoken and len(silent) < 16
        for seed, answer in answers.items():
            if answer.status_code == 200:
                assert len(answer.content) > 0
                assert answer.headers["x-seed"] == str(seed)
            else:
                assert seed in silent
                assert (answer.status_code, REASON in answer.text) == (500, True)
        for seed in spoken:
            assert answers[seed].content == answers[seed + 1].content
            streamed = speak(client, TEXT, tts_model_name="shy", seed=seed, stream=True, **VOICE, **FREE)
            assert len(streamed.content) == len(answers[seed].content)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_stays_without_speech_fails(server, stream):
    with server.client() as client:
        answer = speak(client, TEXT, tts_model_name="ending", stream=stream, **VOICE, **FREE)
    assert answer.status_code == 500
    assert answer.json()["message"].startswith(REASON)
    assert server.metric("light_tts_requests_total", route="zero_shot", outcome="failed") > 0


def test_a_conversation_that_stays_without_speech_fails(server):
    opening = {**VOICE, "tts_model_name": "ending", **FREE}
    talk = say(server, SOCKET, [opening, *texts("Hi."), {"finish": True}])
    assert (talk.code, talk.audio) == (1011, b"")
    assert [(error["status"], REASON in error["error"]) for error in talk.errors] == [(500, True)]


def test_a_conversation_without_speech_is_drawn_again(server):
    opening = {**VOICE, "tts_model_name": "shy", **FREE}
    sent = [*texts("Hi."), {"finish": True}]
    talks = [say(server, SOCKET, [{**opening, "seed": seed}, *sent]) for seed in range(12)]
    assert all(talk.audio for talk in talks if talk.code == 1000)
    assert {talk.code for talk in talks} <= {1000, 1011}
    ids = {talk.headers["x-request-id"]: seed for seed, talk in enumerate(talks)}
    assert any(talks[seed].code == 1000 for seed in silent_seeds(server, ids))


def test_nothing_is_left_of_it_in_the_stages(server):
    gauges = ("light_tts_llm_kv_slots_used", "light_tts_stage_queue_depth")
    assert eventually(lambda: not any(map(server.metric, gauges)), 10)
