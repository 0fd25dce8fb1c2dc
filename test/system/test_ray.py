"""Two servers behind Ray Serve: one address, the same voices, and what becomes of requests when one dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
import websockets
from support.replicas import fronts, replica_of, run_streams, start_replicas, urls, wait_for_servers
from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server, speak

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def replicas() -> Iterator[Server]:
    with start_replicas(2, max_wait=600) as server:  # a slow machine refuses none
        yield server


def test_a_voice_added_to_one_speaks_on_all_within_a_second(replicas):
    with replicas.client() as client:
        form = {"spk_id": "anna", "prompt_text": PROMPT_TEXT}
        client.post("/add_spk", data=form, files={"prompt_wav": PROMPT_WAV.read_bytes()}).raise_for_status()
    added = time.monotonic()
    for url in urls(replicas):
        assert "anna" in httpx.get(f"{url}/spk_list").text
    assert time.monotonic() - added < 1
    for url in urls(replicas):
        with httpx.Client(base_url=url, timeout=120) as client:
            assert speak(client, "Hello.", spk_id="anna").status_code == 200


def test_refusals_pass_with_their_headers(replicas):
    with replicas.client() as client:
        answer = client.post("/inference_zero_shot", data={"tts_text": "Hello."})
        assert answer.status_code in (400, 422)
        assert answer.json()["message"] and "x-replica-request-id" in answer.headers


def test_a_websocket_passes(replicas):
    async def talk() -> tuple[int, int | None]:
        size = 0
        async with websockets.connect(f"{replicas.websocket_url}/inference_bistream") as socket:
            await socket.send(json.dumps({"spk_id": "tiny_spk", "max_new_tokens": 40}))
            await socket.send(json.dumps({"tts_text": "Hello there."}))
            await socket.send(json.dumps({"finish": True}))
            async for message in socket:
                size += len(message) if isinstance(message, bytes) else 0
        return size, socket.close_code

    assert asyncio.run(talk()) == (pytest.approx(48_000, abs=47_000), 1000)


def test_requests_that_have_not_begun_are_served_elsewhere_when_a_server_is_killed(replicas):
    victim = fronts(replicas)[0]
    name = kill(replicas, victim, victim.pid, streams=12, begun=4)
    assert name in map(replica_of, fronts(replicas)), "its server was not restarted"


def test_requests_that_have_not_begun_are_served_elsewhere_when_a_process_of_ray_is_killed(replicas):
    victim = fronts(replicas)[0]
    name = kill(replicas, victim, victim.ppid(), streams=32, begun=8)
    assert name not in map(replica_of, fronts(replicas)), "Serve starts a new replica under a new name"


def kill(replicas: Server, front: psutil.Process, pid: int, streams: int, begun: int) -> str:
    """Kill this process of a replica when so many streams have begun, check what became of all, wait until
    there are two replicas again and return the name of the killed one."""
    wait_for_servers(replicas, 2)
    name = replica_of(front)
    found = run_streams(replicas, streams, lambda: os.kill(pid, signal.SIGKILL), begun=begun)
    print(f"killed a process of {name}: {found}")
    assert not found.not_begun and not found.refused, found
    assert len(found.complete) + len(found.cut_off) == streams, found
    assert set(found.cut_off) <= {name}, "a stream of the other replica was cut off"
    assert len(set(found.sizes)) == 1, "an answer that was broken off must not look complete"
    wait_for_servers(replicas, 2)
    return name


def test_streams_end_before_the_command_does(replicas):
    wait_for_servers(replicas, 2)

    def stop() -> None:
        replicas.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{replicas.url}/liveness").status_code != 404:  # refused while the streams continue
            time.sleep(0.1)

    found = run_streams(replicas, 8, stop, begun=8, tokens=400)
    assert len(found.complete) == 8, found
    assert replicas.process.wait(200) == 0
