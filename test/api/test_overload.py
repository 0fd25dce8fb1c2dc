"""More requests than the server can serve: excess ones are refused at once, and accepted ones get all their
audio. The figures are measured by test/overload.py."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from support.server_process import Server, speak, start_server

from light_tts.server.httpserver.admission import ALWAYS

TEXT = "The day was long and bright."
TOKENS = 50
BYTES = TOKENS * 960 * 2
FEW, CLIENTS = ALWAYS + 4, 64


@pytest.fixture(scope="module")
def server():
    with start_server(httpserver_workers=2, max_wait=0.05) as running:
        asyncio.run(crowd(running, FEW))  # what is measured
        yield running


async def stream(client: httpx.AsyncClient) -> tuple[int, int, httpx.Headers]:
    """Return status, bytes of the whole body, headers. Raises if the response is cut off."""
    fields = {
        "tts_text": TEXT,
        "spk_id": "tiny_spk",
        "stream": True,
        "seed": 0,
        "min_new_tokens": TOKENS,
        "max_new_tokens": TOKENS,
    }
    async with client.stream("POST", "/inference_zero_shot", json=fields) as answer:
        size = sum([len(piece) async for piece in answer.aiter_raw()])
        return answer.status_code, size, answer.headers


async def crowd(server: Server, clients: int) -> list[tuple[int, int, httpx.Headers]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(stream(client) for _ in range(clients)))


def test_a_crowd_is_refused_in_part_and_nobody_is_cut_off(server):
    before = server.metric("light_tts_refused_total", reason="wait") or 0
    answers = asyncio.run(crowd(server, CLIENTS))
    served = [size for status, size, _ in answers if status == 200]
    refused = [headers for status, _, headers in answers if status == 429]
    assert len(served) + len(refused) == CLIENTS
    assert len(served) >= ALWAYS and set(served) == {BYTES}
    assert refused and all(int(headers["retry-after"]) >= 1 for headers in refused)
    assert server.metric("light_tts_refused_total", reason="wait") == before + len(refused)
    assert server.metric("light_tts_requests_total", outcome="busy") == before + len(refused)
    with server.client() as client:
        assert speak(client, TEXT).status_code == 200
