"""The WebSockets that receive text while they send audio, against a real server."""

from __future__ import annotations

import asyncio
import base64
import json
import re

import pytest
import websockets
from support.processes import find_below
from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server
from support.waiting import eventually

RECORDING = PROMPT_WAV.read_bytes()
PIECES = ["Hello there, ", "how are you ", "on this fine ", "and sunny morning? ", "I am very well."]
FINISH = {"finish": True}
SHORT = {"max_new_tokens": 60}
BY_TEXT = {"prompt_text": PROMPT_TEXT, **SHORT}
BY_RECORDING = {**BY_TEXT, "prompt_wav": base64.b64encode(RECORDING).decode()}
BY_NAME = {"spk_id": "tiny_spk", **SHORT}
UPSTREAM = "/inference_zero_shot_bistream"
OURS = "/inference_bistream"


@pytest.fixture(scope="module")
def server(mortal_server: Server) -> Server:
    mortal_server.wait_until_ready()  # other files kill its processes
    return mortal_server


class Talk:
    """The audio, errors and close received on one WebSocket."""

    def __init__(self) -> None:
        self.audio = bytearray()
        self.errors: list[dict] = []
        self.code: int | None = None
        self.reason = ""
        self.headers: dict[str, str] = {}


async def send(socket, message) -> None:
    await socket.send(message if isinstance(message, bytes | str) else json.dumps(message))


async def talk(server: Server, path: str, sent: list, timeout: float = 60.0, pause: float = 0.0) -> Talk:
    """Send everything, with pauses of `pause` seconds, then receive until the server closes."""
    result = Talk()
    async with websockets.connect(server.websocket_url + path, max_size=None) as socket:
        result.headers = dict(socket.response.headers)
        try:
            for message in sent:
                await send(socket, message)
                await asyncio.sleep(pause)
        except websockets.ConnectionClosed:
            pass
        try:
            while True:
                message = await asyncio.wait_for(socket.recv(), timeout)
                if isinstance(message, bytes):
                    result.audio += message
                else:
                    result.errors.append(json.loads(message))
        except websockets.ConnectionClosed as closed:
            assert closed.rcvd is not None, "the connection was cut without a close"
            result.code, result.reason = closed.rcvd.code, closed.rcvd.reason
    return result


def say(server: Server, path: str, sent: list) -> Talk:
    return asyncio.run(talk(server, path, sent))


def texts(*pieces: str) -> list[dict]:
    return [{"tts_text": piece} for piece in pieces]


def test_the_upstream_protocol_gives_audio_and_a_clean_close(server):
    result = say(server, UPSTREAM, [BY_TEXT, RECORDING, *texts(*PIECES), FINISH])
    assert (result.code, result.errors) == (1000, [])
    assert len(result.audio) > 0 and len(result.audio) % 2 == 0
    assert result.headers["x-sample-rate"] == "24000"


def test_the_seed_that_was_drawn_is_told_and_gives_the_same_audio(server):
    first = say(server, OURS, [BY_RECORDING, *texts(*PIECES), FINISH])
    seed = int(first.headers["x-seed"])
    assert say(server, OURS, [{**BY_RECORDING, "seed": seed}, *texts(*PIECES), FINISH]).audio == first.audio


def test_both_routes_give_the_same_audio_for_the_same_seed(server):
    first = say(server, UPSTREAM, [{**BY_TEXT, "seed": 4}, RECORDING, *texts(*PIECES), FINISH])
    second = say(server, OURS, [{**BY_RECORDING, "seed": 4}, *texts(*PIECES), FINISH])
    assert first.audio == second.audio


def test_lengths_and_sampling_can_be_chosen(server):
    options = {"seed": 4, "min_new_tokens": 50, "max_new_tokens": 50, "top_k": 2, "temperature": 0.5}
    first = say(server, UPSTREAM, [{**BY_TEXT, **options}, RECORDING, *texts(*PIECES), FINISH])
    second = say(server, OURS, [{**BY_RECORDING, **options}, *texts(*PIECES), FINISH])
    other = say(server, OURS, [{**BY_RECORDING, **options, "top_k": 64}, *texts(*PIECES), FINISH])
    assert first.audio == second.audio != other.audio
    seconds = 50 / 25  # fill ids of the two-way mode count as tokens and are not heard
    assert seconds - 5 / 25 <= len(first.audio) / 48000 <= seconds


def test_a_named_speaker_needs_no_recording(server):
    result = say(server, OURS, [BY_NAME, *texts(*PIECES), FINISH])
    assert (result.code, result.errors) == (1000, [])
    assert result.audio


def test_the_last_text_may_come_with_the_finish(server):
    init = {**BY_RECORDING, "seed": 4}
    apart = say(server, OURS, [init, *texts(*PIECES), FINISH])
    together = say(server, OURS, [init, *texts(*PIECES[:-1]), {"tts_text": PIECES[-1], **FINISH}])
    assert apart.audio == together.audio


def test_audio_is_the_same_however_the_text_is_cut_and_whenever_it_comes(server):
    text = "Dr. Smith paid $3.50 at 10:30. “That’s 1,234 sq ft,” he said, and café 今天很好."
    init = {"spk_id": "tiny_spk", "max_new_tokens": 300, "seed": 8}
    whole = say(server, OURS, [init, *texts(text), FINISH])
    words = [text[begin : begin + 3] for begin in range(0, len(text), 3)]
    cuts = [list(text), words, ["", text[:30], " ", text[31:], "\n"]]
    answers = [say(server, OURS, [init, *texts(*pieces), FINISH]) for pieces in cuts]
    late = asyncio.run(talk(server, OURS, [init, *texts(*words), FINISH], pause=0.05))
    assert whole.code == 1000 and whole.audio
    assert all(answer.audio == whole.audio for answer in [*answers, late])


def test_numbers_are_read_as_in_whole_answers(server):
    init = {**BY_NAME, "seed": 9}
    digits = say(server, OURS, [init, *texts("It costs $3", ".", "50 at 10:", "30 and 1,2", "34."), FINISH])
    read = ["It costs three point five dollars at ten thirty and thousand two hundred and thirty four."]
    assert digits.audio == say(server, OURS, [init, *texts(*read), FINISH]).audio != b""


@pytest.mark.parametrize("text", ["...", "“ ” !", "\u200b"])
def test_text_with_nothing_to_say_is_refused(server, text):
    result = say(server, OURS, [BY_NAME, *texts(text), FINISH])
    assert ["the text is empty" in error["error"] for error in result.errors] == [True]
    assert result.code == 1008


def test_audio_leaves_while_text_still_arrives(server):
    async def converse() -> bytes:
        async with websockets.connect(server.websocket_url + OURS, max_size=None) as socket:
            await send(socket, BY_RECORDING)
            for piece in PIECES * 2:
                await send(socket, {"tts_text": piece})
            first = await asyncio.wait_for(socket.recv(), 60)
            await send(socket, {"tts_text": "And that is all."})
            await send(socket, FINISH)
            return first

    assert isinstance(asyncio.run(converse()), bytes)


@pytest.mark.parametrize(
    ("path", "sent", "code", "message"),
    [
        (UPSTREAM, [{}], 1008, "prompt_text"),
        (UPSTREAM, [FINISH], 1008, "finish: comes in the messages after the first"),
        (UPSTREAM, [{**BY_TEXT, "stream": True}], 1008, "stream: is not available here"),
        (UPSTREAM, [{**BY_TEXT, "prompt_wav": "AAAA"}], 1008, "prompt_wav: belongs to /inference_bistream"),
        (OURS, [{**BY_NAME, "speed": 1.0}], 1008, "speed: is not available here"),
        (OURS, [{**BY_NAME, "format": "wav"}], 1008, "format: is not available here"),
        (OURS, [{**BY_NAME, "topk": 5}], 1008, "topk: unknown field; did you mean top_k?"),
        (OURS, [BY_NAME, {"text": "Hi."}], 1008, "text: unknown field; did you mean tts_text?"),
        (OURS, [BY_NAME, {"tts_text": "Hi.", "seed": 1}], 1008, "seed: belongs in the first message"),
        (OURS, [BY_NAME, {}], 1008, "tts_text or finish"),
        (UPSTREAM, [BY_TEXT, FINISH], 1008, "recording"),
        (
            UPSTREAM,
            [BY_TEXT, RECORDING, FINISH],
            1008,
            "finish came before any tts_text",
        ),
        (UPSTREAM, [BY_TEXT, b"no sound"], 1003, "audio file format is incorrect"),
        (
            UPSTREAM,
            [{**BY_TEXT, "tts_model_name": "nobody"}],
            1008,
            "unknown tts_model_name",
        ),
        (UPSTREAM, [{"prompt_text": 5}], 1008, "prompt_text"),
        (UPSTREAM, [{**BY_TEXT, "top_p": 2}], 1008, "top_p: Input should be less than or equal to 1"),
        (OURS, [{**BY_NAME, "top_k": 0}], 1008, "top_k: Input should be greater than or equal to 1"),
        (OURS, [{**BY_NAME, "min_new_tokens": 70}], 1008, "min_new_tokens 70 is above max_new_tokens 60"),
        (UPSTREAM, [RECORDING], 1008, "JSON"),
        (UPSTREAM, ["no JSON"], 1008, "JSON"),
        (UPSTREAM, ["[1, 2]"], 1008, "JSON object"),
        (OURS, [{}], 1008, "no voice was given: name one with spk_id"),
        (OURS, [{"spk_id": "nobody"}], 1008, "unknown spk_id"),
        (OURS, [{"spk_id": "../x"}], 1008, "spk_id"),
        (OURS, [{"prompt_wav": "%", "prompt_text": ""}], 1008, "base64"),
        (OURS, [BY_NAME, *texts(" ", "\n"), FINISH], 1008, "finish came before any tts_text"),
        (OURS, [BY_NAME, {"tts_text": 5}], 1008, "tts_text"),
        (OURS, [BY_NAME, {"tts_text": "a\0"}], 1008, "null"),
        (OURS, [BY_NAME, *texts("x" * 3000, "x" * 3000)], 1008, "characters"),
        (OURS, [BY_NAME, b"\x00\x01"], 1008, "JSON"),
        (OURS, [BY_NAME, {"hello": 1}], 1008, "hello: unknown field; known are tts_text, finish"),
    ],
)
def test_an_error_comes_as_json_before_the_close(server, path, sent, code, message):
    result = say(server, path, sent)
    assert [message in error["error"] for error in result.errors] == [True], result.errors
    assert result.code == code
    if re.match(r"\w+: ", message):  # about a field
        assert result.errors[0]["status"] == 422


def test_a_client_that_goes_away_frees_its_work(server):
    async def leave() -> None:
        async with websockets.connect(server.websocket_url + OURS, max_size=None) as socket:
            await send(socket, {**BY_RECORDING, "max_new_tokens": 2000})
            for piece in PIECES * 4:
                await send(socket, {"tts_text": piece})
            await asyncio.wait_for(socket.recv(), 60)

    before = server.metric("light_tts_requests_total", route="bistream", outcome="disconnected")
    asyncio.run(leave())
    assert eventually(
        lambda: (
            server.metric("light_tts_requests_total", route="bistream", outcome="disconnected") > before
            and server.metric("light_tts_llm_kv_slots_used") == 0
        )
    )


def test_a_conversation_that_never_finishes_ends_at_its_deadline(strict_server):
    result = say(strict_server, OURS, [BY_NAME, *texts("Hello.")])
    assert (
        "longer than 3 s" in result.errors[0]["error"]
        or "the client sent nothing" in result.errors[0]["error"]
    )
    silent = say(strict_server, OURS, [])  # no first message at all
    assert "the client sent nothing" in silent.errors[0]["error"]
    assert silent.code == 1008


def kill(server: Server, stage: str) -> None:
    """Kill all processes of the stage."""
    processes = find_below(server.pid, "--stage", stage)
    assert processes, f"no {stage} process"
    for process in processes:
        process.kill()


async def converse(server: Server, stage_to_kill: str | None) -> bytes:
    """A conversation in which this stage dies after the first audio, while text is still arriving."""
    audio = bytearray()
    async with websockets.connect(server.websocket_url + OURS, max_size=None) as socket:
        await send(socket, {**BY_RECORDING, "seed": 11, "max_new_tokens": 150})
        for piece in PIECES * 3:
            await send(socket, {"tts_text": piece})
        audio += await asyncio.wait_for(socket.recv(), 60)
        if stage_to_kill is not None:
            kill(server, stage_to_kill)
        for piece in PIECES:
            await send(socket, {"tts_text": piece})
        await send(socket, FINISH)
        try:
            while True:
                message = await asyncio.wait_for(socket.recv(), 90)
                assert isinstance(message, bytes), message
                audio += message
        except websockets.ConnectionClosedOK:
            return bytes(audio)


def test_a_stage_killed_in_a_conversation_loses_no_sample(server):
    undisturbed = asyncio.run(converse(server, None))
    for stage in ("encode", "llm", "decode"):
        assert asyncio.run(converse(server, stage)) == undisturbed, stage
        server.wait_until_ready()
