"""A real server with a CosyVoice3 checkpoint."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import websockets
from support.server_process import FEW_STEPS, GOLDEN, Server, speak, start_server
from support.streams import TOKENS, Client, assert_same_audio, run_clients, stage_pid

CHECKPOINT = GOLDEN.parent / "cosyvoice3" / "checkpoint"
TEXT = "Hello there, how are you today?"
EXACT = {"min_new_tokens": "40", "max_new_tokens": "40", "seed": "5"}
TRANSCRIPT = "Good morning."
MARK = "<|endofprompt|>"
PREFIX = f"You are a helpful assistant.{MARK}"
SAMPLES = 960  # of a speech token


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start_server(model_dir=CHECKPOINT, decode_process_num=2, **FEW_STEPS) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def say(http: httpx.Client, **fields: object) -> bytes:
    """Return the PCM of TEXT, spoken by the golden recording unless `fields` choose another voice."""
    answer = speak(http, **{"text": TEXT, **EXACT, **fields})
    assert answer.status_code == 200, answer.text
    return answer.content


def test_it_says_what_it_is(http):
    assert http.get("/spk_list").json()
    assert len(say(http)) == 2 * 40 * SAMPLES
    assert say(http) == say(http) != say(http, seed=6)


def test_a_stream_has_all_samples(http):
    long = {"min_new_tokens": 120, "max_new_tokens": 120, "stream": True}
    streamed = say(http, **long)
    assert len(streamed) == 2 * 120 * SAMPLES
    assert say(http, **long) == streamed
    assert np.frombuffer(streamed, np.int16).std() > 10


def test_the_prefix_of_a_prompt_is_added_where_it_is_missing(http):
    bare = say(http, prompt_text=TRANSCRIPT)
    assert bare == say(http, prompt_text=PREFIX + TRANSCRIPT)
    assert bare != say(http, prompt_text=f"You are a pirate.{MARK}{TRANSCRIPT}")


def test_only_the_timbre_of_a_recording(http):
    timbre = say(http, prompt_text="")
    assert timbre == say(http, prompt_text=PREFIX) != say(http, prompt_text=TRANSCRIPT)
    assert timbre == say(http, prompt_text="", text=PREFIX + TEXT)  # as the official examples write it


@pytest.mark.parametrize("voice", [{}, {"spk_id": "tiny_spk"}])
def test_instructions(http, voice):
    official = f"You are a helpful assistant. Speak softly.{MARK}"
    spoken = say(http, prompt_text=official, **voice)
    assert spoken == say(http, prompt_text=f"Speak softly.{MARK}", **voice)
    assert spoken != say(http, prompt_text=f"Shout.{MARK}", **voice)


def test_a_killed_stage_loses_no_sample(server):
    """The source's phase depends on all frames before, so a stream that continues speaks all its chunks
    again, without sending them."""
    undisturbed = run_clients(server)
    assert all(len(samples) == TOKENS * SAMPLES for samples in undisturbed)

    async def kill(clients: list[Client], stage: str) -> None:
        pid = stage_pid(server, stage)
        while not any(len(client.received) > 60_000 for client in clients):
            await asyncio.sleep(0.002)
        os.kill(pid, signal.SIGKILL)

    for stage in ("decode", "llm"):
        assert_same_audio(run_clients(server, lambda clients, stage=stage: kill(clients, stage)), undisturbed)
        server.wait_until_ready()


async def talk(server: Server, pieces: list[str]) -> bytes:
    """Return the audio of a text that arrives in pieces."""
    audio = bytearray()
    recording = base64.b64encode((GOLDEN.parent / "cosyvoice3" / "prompt.wav").read_bytes()).decode()
    first = {"prompt_text": TRANSCRIPT, "prompt_wav": recording, "seed": 3, "max_new_tokens": 80}
    async with websockets.connect(f"{server.websocket_url}/inference_bistream", max_size=None) as socket:
        for message in (first, *({"tts_text": piece} for piece in pieces), {"finish": True}):
            await socket.send(json.dumps(message))
        async for message in socket:
            assert isinstance(message, bytes), message
            audio += message
    return bytes(audio)


def test_text_that_arrives_in_pieces(server):
    pieces = ["Hello there, how ", "are you on this ", "fine and sunny morning? I am very well."]
    whole = asyncio.run(talk(server, ["".join(pieces)]))
    assert len(whole) > 2 * 24_000
    assert asyncio.run(talk(server, pieces)) == whole
