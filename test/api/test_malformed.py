"""Malformed requests, generated with a fixed seed: each gets a 4xx, and the server is unaffected."""

from __future__ import annotations

import asyncio

import pytest
from support.hostile import harmed, send_all
from support.server_process import Server, speak

SEED = 20_25


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [250, pytest.param(500, marks=pytest.mark.nightly)])
def test_malformed_requests_do_no_harm(server: Server, count: int):
    with server.client() as client:
        before = speak(client, "Hello there.", seed=1)
        assert before.status_code == 200
        ready = client.get("/readiness").json()

    answers = asyncio.run(send_all(server, count, SEED))
    assert [answer for answer in answers if harmed(answer)] == []
    assert sum(answer.status >= 400 for answer in answers) > count / 2

    with server.client() as client:
        assert speak(client, "Hello there.", seed=1).content == before.content
        assert client.get("/readiness").json() == ready
        assert client.get("/health").status_code == 200
    assert server.metric("light_tts_stage_restarts_total") == 0
    assert server.metric("light_tts_llm_kv_slots_used") == 0
    assert "Traceback" not in server.output
