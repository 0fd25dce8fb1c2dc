"""What LightTTS is known to get wrong, and the test that shows that this server does not.

Correctness
- a stop id other than eos reaches the flow: test_any_stop_id_ends_the_speech_and_is_not_spoken;
  test_llm_engine::test_any_stop_id_ends_a_part_and_is_no_output;
  test_decode_policy::test_ids_that_are_no_speech_never_reach_the_flow
- 40 ms are lost where eos falls on a chunk border: test_no_sample_is_lost_at_any_length_around_a_border
- the nucleus leaves out the id that crosses top_p, and the fallback can draw the repeated id again:
  test_sampling::test_nucleus_and_fallback_are_the_official_ones
- bistream needs more than 5 text ids to go on: test_bistream_goes_on_with_exactly_five_text_ids
- a prompt is evicted while in use: test_prompts_evicted_under_load_keep_their_voices;
  test_prompt_cache::test_a_prompt_in_use_is_never_evicted
- who opens the prompt cache clears it:
  test_prompt_cache::test_a_restarted_owner_adopts_complete_entries_and_removes_the_rest
- an unknown tts_model_name costs a request slot: test_an_unknown_style_holds_nothing
- chunk borders depend on the backend: test_streamed_chunks_end_where_the_specification_says;
  test_flow::test_estimator_equals_the_exported_graph
- an error after the first byte looks like a complete answer:
  test_a_stream_whose_stage_is_given_up_ends_incomplete;
  test_http_api::test_a_stream_beyond_its_deadline_is_cut_so_that_the_client_notices
Hangs and leaks
- a prompt whose first request is aborted or has no words stops everybody:
  test_others_get_the_prompt_that_an_aborted_request_asked_for_first;
  test_text_without_words_is_refused_and_the_next_is_spoken
- a recording over 30 s stops everybody: test_a_recording_over_30_s_is_refused_and_the_next_is_spoken
- aborts hold request slots: test_sixty_clients_that_leave_hold_nothing
- aborted requests stay in the queue: test_an_aborted_request_leaves_the_queue_at_once
- waits without limit: test_a_request_that_waits_for_its_turn_gets_504_at_its_deadline;
  test_http_api::test_a_request_beyond_its_deadline_gets_504,
  test_requests_beyond_the_limit_get_429_and_do_not_disturb_those_in_work
- WebSocket: finish as the first message waits for ever:
  test_websocket::test_an_error_comes_as_json_before_the_close
- a full output ring makes decode spin: test_a_client_that_reads_nothing_holds_up_nobody
Waste
- everything polls: test_an_idle_server_sleeps
- one request at a time in decode: test_decode_stage::test_a_padded_batch_sounds_as_its_items_alone
- decode processes are bound to styles and no more than those:
  test_http_api::test_health_speaks_through_every_decode_process
- reading sizes loads the LLM: test_checkpoint_errors::test_yaml_is_data_and_runs_nothing
Operations
- booleans cannot be switched off: test_cli::test_booleans_take_true_and_false
- flags without effect: test_cli::test_flags_of_lighttts_that_never_acted_are_accepted_and_named_in_one_line
- histograms and counters that never move: test_successes_and_failures_are_counted_and_timed
- a crash leaves shared memory, and its names are predictable:
  test_lifecycle::test_a_killed_parent_leaves_nothing,
  test_a_start_removes_what_dead_servers_left_and_nothing_else;
  test_sockets_and_shared_memory_are_private_and_their_names_not_predictable
- /health needs a recording of the repository and is not cached:
  test_http_api::test_health_speaks_through_every_decode_process
- no limit of uploads: test_http_api::test_a_body_above_the_limit_is_refused
- no WAV, no seed: test_http_api::test_a_wav_has_a_right_header,
  test_the_same_seed_gives_the_same_audio_and_another_seed_does_not
- styles are whole weight files chosen by name: test_each_style_speaks_with_its_own_weights
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import soundfile
import websockets
from support.processes import find_below
from support.server_process import (
    FEW_STEPS,
    LARGE,
    PROMPT_TEXT,
    PROMPT_WAV,
    Server,
    speak,
    start_server,
)
from support.styles import STYLES, checkpoint_with
from support.waiting import eventually

TEXT = "Hello there, how are you today?"
TOKEN_SAMPLES = 960
OVERLAP_SAMPLES = 3840  # held back at a chunk's end for the cross-fade
HOP, LOOKAHEAD = 25, 3  # tokens
PROMPT_TOKENS = 98  # of the golden prompt
SPEAKER = "tiny_spk"  # of the golden checkpoint; no prompt tokens
SHORT = {"min_new_tokens": 10, "max_new_tokens": 10}
ENDLESS = {"tts_model_name": "ending", "min_new_tokens": 30000, "max_new_tokens": 30000}


@pytest.fixture
def server(styles_server: Server) -> Server:
    """Two requests at a time in each style, room for one prompt only."""
    return styles_server


@pytest.fixture()
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as http:
        yield http


def busy(server: Server) -> dict[str, float]:
    """Gauges that are 0 when nothing is under way, and are not."""
    names = ("llm_running_requests", "llm_paused_requests", "llm_waiting_requests", "llm_kv_slots_used")
    gauges = {name: server.metric(f"light_tts_{name}") for name in (*names, "stage_queue_depth")}
    return {name: value for name, value in gauges.items() if value}


def recording(seconds: float, seed: int) -> bytes:
    """The golden prompt from some place on, over and over: another voice print for each seed."""
    samples, rate = soundfile.read(PROMPT_WAV, dtype="float32")
    start = 4000 * seed
    samples = np.roll(samples, -start) * (1 - 0.05 * seed)
    file = io.BytesIO()
    soundfile.write(file, np.resize(samples, int(seconds * rate)), rate, format="WAV")
    return file.getvalue()


def body(wav: bytes, **fields: object) -> dict[str, object]:
    """JSON of a request with this recording."""
    common = {"tts_text": TEXT, "prompt_text": PROMPT_TEXT, "min_new_tokens": 40, "max_new_tokens": 40}
    return {**common, "prompt_wav": base64.b64encode(wav).decode(), **fields}


def pcm(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, np.int16).astype(int)


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert len(got) == len(expected)
    assert np.abs(got - expected).max() <= 2


def streamed_sizes(server: Server, **fields: object) -> list[int]:
    """Bytes of each HTTP chunk of a streamed answer, as they are on the wire."""
    request = {"tts_text": TEXT, "stream": True, **fields}
    if "spk_id" not in fields:
        request = body(PROMPT_WAV.read_bytes(), **request)
    content = json.dumps(request).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = "POST /inference_zero_shot HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer
    sizes = []
    while rest:
        length, _, rest = rest.partition(b"\r\n")
        sizes.append(int(length, 16))
        rest = rest[sizes[-1] + 2 :]
    assert sizes.pop() == 0, "the answer is not complete"
    return sizes


def chunk_sizes(tokens: int, prompt_tokens: int) -> list[int]:
    """The same by the specification of streaming."""
    ends, end = [], HOP + -prompt_tokens % HOP
    while end + LOOKAHEAD <= tokens:
        ends.append(end * TOKEN_SAMPLES - OVERLAP_SAMPLES)
        end += HOP
    ends.append(tokens * TOKEN_SAMPLES)
    return [2 * size for size in np.diff([0, *ends]).tolist()]


# ---------------------------------------------------------------- correctness

BORDERS = [1, *range(HOP - 1, HOP + 6), *range(2 * HOP - 1, 2 * HOP + 6)]


@pytest.mark.parametrize(("style", "voice"), [("ending", "speaker"), ("plain", "recording")])
def test_no_sample_is_lost_at_any_length_around_a_border(server, style, voice):
    """`ending` ends by eos at exactly that length, `plain` by max_new_tokens."""
    chosen = {"spk_id": SPEAKER} if voice == "speaker" else {}

    def sizes(tokens: int) -> list[int]:
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens + (style == "ending")}
        return streamed_sizes(server, tts_model_name=style, seed=1, **length, **chosen)

    with ThreadPoolExecutor(2) as threads:
        streams = list(threads.map(sizes, BORDERS))
    assert [sum(stream) for stream in streams] == [2 * TOKEN_SAMPLES * tokens for tokens in BORDERS]


@pytest.mark.parametrize("tokens", [20, 28, 29, 30, 90])
def test_streamed_chunks_end_where_the_specification_says(server, tokens):
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    assert streamed_sizes(server, **length) == chunk_sizes(tokens, PROMPT_TOKENS)
    assert streamed_sizes(server, spk_id=SPEAKER, **length) == chunk_sizes(tokens, 0)


def test_any_stop_id_ends_the_speech_and_is_not_spoken(server, client):
    limits = {"min_new_tokens": 0, "max_new_tokens": 60, "tts_model_name": "stopping"}
    lengths = set()
    for seed in range(6):
        whole = pcm(speak(client, TEXT, seed=seed, **limits))
        tokens, rest = divmod(len(whole), TOKEN_SAMPLES)
        assert rest == 0
        lengths.add(tokens)
        streamed = pcm(speak(client, TEXT, seed=seed, stream=True, **limits))
        assert len(streamed) == len(whole)
    assert len(lengths) > 3 and 60 not in lengths, "the style was made to stop here and there"
    assert server.metric("light_tts_stage_restarts_total") == 0


def test_bistream_goes_on_with_exactly_five_text_ids(server):
    """A block is 5 text ids and 15 speech tokens: two blocks are enough for the first chunk, one is not."""

    async def converse() -> None:
        url = f"{server.websocket_url}/inference_bistream"
        async with websockets.connect(url, max_size=None) as connection:
            await connection.send(json.dumps({"spk_id": SPEAKER, "seed": 1}))
            await connection.send(json.dumps({"tts_text": "The water was cold then "}))  # 5 ids
            await connection.send(json.dumps({"tts_text": "you and the day "}))  # 4
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(connection.recv(), 1.0)
            await connection.send(json.dumps({"tts_text": "train "}))
            first = await asyncio.wait_for(connection.recv(), 10)
            assert len(first) == chunk_sizes(30, 0)[0]
            await connection.send(json.dumps({"finish": True}))
            with pytest.raises(websockets.ConnectionClosedOK):
                while True:
                    assert isinstance(await asyncio.wait_for(connection.recv(), 10), bytes)

    asyncio.run(converse())


def test_prompts_evicted_under_load_keep_their_voices(server):
    requests = [body(recording(2, seed), seed=seed, stream=seed % 2 == 1) for seed in range(6)]

    def say(request: dict[str, object]) -> np.ndarray:
        with server.client() as own:
            return pcm(own.post("/inference_zero_shot", json=request))

    alone = [say(request) for request in requests]
    assert len({audio.tobytes() for audio in alone}) == len(alone)
    misses = server.metric("light_tts_prompt_cache_misses_total")
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(say, requests * 2))
    for got, expected in zip(together, alone * 2, strict=True):
        assert_same(got, expected)
    assert server.metric("light_tts_prompt_cache_misses_total") > misses  # there was room for one prompt only
    kept = [path for path in Path("/dev/shm").glob(f"light_tts-{server.port}-*/*.prompt")]
    assert len(kept) <= 1


def test_an_unknown_style_holds_nothing(server, client):
    held = len(psutil.Process(server.pid).children(recursive=True)[-1].open_files())
    for _ in range(50):
        answer = speak(client, TEXT, spk_id=SPEAKER, tts_model_name="nobody")
        assert answer.status_code == 400
        assert "nobody" in answer.json()["message"]
    assert not busy(server)
    assert len(psutil.Process(server.pid).children(recursive=True)[-1].open_files()) <= held
    for _ in range(4):
        pcm(speak(client, TEXT, spk_id=SPEAKER))


def test_each_style_speaks_with_its_own_weights(client):
    assert client.get("/query_tts_model").json() == {"tts_models": list(STYLES)}
    length = {"min_new_tokens": 30, "max_new_tokens": 30, "seed": 1}
    first, plain = (
        speak(client, TEXT, tts_model_name=name, **length).content for name in ("default", "plain")
    )
    assert first == plain
    endings = speak(client, TEXT, tts_model_name="ending", min_new_tokens=7, max_new_tokens=30, seed=1)
    assert len(pcm(endings)) == 7 * TOKEN_SAMPLES


# ---------------------------------------------------------------- hangs and leaks


def test_others_get_the_prompt_that_an_aborted_request_asked_for_first(server):
    request = body(recording(29, seed=11), seed=5, **SHORT)

    async def converse() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

            def ask() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(http.post("/inference_zero_shot", json=request))

            leaving = ask()
            await asyncio.sleep(0.1)
            others = [ask(), ask()]
            await asyncio.sleep(0.05)
            leaving.cancel()
            return await asyncio.gather(*others)

    answers = [pcm(answer) for answer in asyncio.run(converse())]
    assert len(answers[0]) == 10 * TOKEN_SAMPLES
    assert_same(answers[1], answers[0])


@pytest.mark.parametrize("text", ["。。。", "!!!", "…", "“”", "🙂", "\u200b"])
def test_text_without_words_is_refused_and_the_next_is_spoken(client, text):
    answer = client.post("/inference_zero_shot", json=body(recording(1, seed=3), tts_text=text))
    assert answer.status_code == 400, answer.content[:200]
    pcm(client.post("/inference_zero_shot", json=body(recording(1, seed=3))))


def test_a_recording_over_30_s_is_refused_and_the_next_is_spoken(client):
    for seconds, status in ((30.1, 400), (200, 400), (30.0, 200)):
        answer = client.post("/inference_zero_shot", json=body(recording(seconds, seed=4), **SHORT))
        assert answer.status_code == status, answer.text[:200]


def test_sixty_clients_that_leave_hold_nothing(server, client):
    def leave(number: int) -> None:
        seconds = 0.01 * number  # while reading, encoding, waiting, generating, speaking
        fields = {"stream": number % 2 == 0, **ENDLESS, "seed": number}
        request = body(recording(1, number % 3), **fields)
        with (
            contextlib.suppress(httpx.TimeoutException),
            server.client(timeout=httpx.Timeout(10, read=seconds)) as own,
            own.stream("POST", "/inference_zero_shot", json=request) as answer,
        ):
            next(answer.iter_raw())

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(1, 61)))
    assert eventually(lambda: not busy(server))
    with ThreadPoolExecutor(4) as threads:
        for answer in threads.map(lambda seed: speak(client, TEXT, seed=seed), range(6)):
            assert len(pcm(answer)) > 0


@contextlib.contextmanager
def asked(server: Server, **fields: object) -> Iterator[socket.socket]:
    """A client that has sent a request and reads nothing of the answer; it leaves at the end."""
    content = json.dumps({"tts_text": TEXT, "spk_id": SPEAKER, **fields}).encode()
    head = "POST /inference_zero_shot HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield connection


@contextlib.contextmanager
def occupied(server: Server, count: int) -> Iterator[None]:
    """The LLM has its hands full with as many requests."""
    with contextlib.ExitStack() as stack:
        for seed in range(count):
            stack.enter_context(asked(server, seed=seed, **ENDLESS))
        assert eventually(lambda: server.metric("light_tts_llm_running_requests") == count)
        yield


def test_an_aborted_request_leaves_the_queue_at_once(server):
    def waiting() -> float:
        return server.metric("light_tts_llm_waiting_requests")

    with occupied(server, 2):
        with asked(server, tts_model_name="ending"):
            assert eventually(lambda: waiting() == 1)
        assert eventually(lambda: waiting() == 0)
        assert server.metric("light_tts_llm_running_requests") == 2
    assert eventually(lambda: not busy(server))


def test_a_client_that_reads_nothing_holds_up_nobody(server, client):
    text = "This is one sentence of a text that is long enough to be spoken in many parts. " * 20
    length = {"min_new_tokens": 250, "max_new_tokens": 250, "tts_model_name": "ending"}
    with asked(server, tts_text=text, stream=True, **length) as lazy:
        lazy.recv(100)
        for seed in range(4):
            assert len(pcm(speak(client, TEXT, stream=True, seed=seed))) > 0
        assert eventually(lambda: not busy(server), 60)  # all is spoken though nobody reads it


# ---------------------------------------------------------------- waste and operations


def test_an_idle_server_sleeps(server):
    assert eventually(lambda: not busy(server))
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]

    def seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    time.sleep(0.5)
    before = seconds()
    time.sleep(3)
    assert seconds() - before < 0.15, f"{len(processes)} processes"


def test_successes_and_failures_are_counted_and_timed(server, client):
    def counts() -> list[float]:
        route = {"route": "zero_shot"}
        total = "light_tts_requests_total"
        return [
            server.metric(total, **route, outcome="ok"),
            server.metric(total, **route, outcome="rejected"),
            server.metric("light_tts_request_duration_seconds_count", **route),
            server.metric("light_tts_time_to_first_audio_seconds_count", **route),
        ]

    before = counts()
    pcm(speak(client, TEXT))
    assert speak(client, "!!!").status_code == 400
    assert [after - earlier for after, earlier in zip(counts(), before, strict=True)] == [1, 1, 1, 1]
    assert server.metric("light_tts_request_duration_seconds_sum", route="zero_shot") > 0


def test_sockets_and_shared_memory_are_private_and_their_names_not_predictable(server):
    name = f"light_tts-{server.port}-*"
    (sockets,) = (server.directory / "ipc").glob(name)
    (memory,) = Path("/dev/shm").glob(name)
    for directory in (sockets, memory):
        assert re.fullmatch(rf"light_tts-{server.port}-[0-9a-f]{{12}}", directory.name)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert directory.stat().st_uid == os.getuid()
    assert not [path for path in Path("/tmp").glob(f"*{server.port}*") if path.stat().st_uid == os.getuid()]


# ---------------------------------------------------------------- a server that is given no chance


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = checkpoint_with("ending", folder=tmp_path_factory.mktemp("model"))
    with start_server(model_dir=model, gpt_paral_num=1, request_timeout=6, **LARGE, **FEW_STEPS) as running:
        yield running


def test_a_request_that_waits_for_its_turn_gets_504_at_its_deadline(doomed):
    with occupied(doomed, 1), doomed.client() as http, ThreadPoolExecutor(1) as thread:
        begun = time.monotonic()
        # endless too: it may get the turn of the first, which has a little less time left
        answer = thread.submit(speak, http, TEXT, **ENDLESS)
        assert eventually(lambda: doomed.metric("light_tts_llm_waiting_requests") == 1)
        assert answer.result().status_code == 504
        assert 5 < time.monotonic() - begun < 7


def test_a_stream_whose_stage_is_given_up_ends_incomplete(doomed):
    killed = set()

    def kill_decode() -> bool:
        for process in find_below(doomed.pid, "--stage", "decode"):
            if process not in killed:
                process.kill()
                killed.add(process)
                return True
        return False

    def failures() -> float:
        """As the stage is given up, as the request is refused after deaths of its own, or out of time."""
        outcomes = ("unavailable", "failed", "timeout")
        return sum(
            doomed.metric("light_tts_requests_total", route="zero_shot", outcome=outcome)
            for outcome in outcomes
        )

    request = {"tts_text": TEXT, "spk_id": SPEAKER, "stream": True, **ENDLESS}
    request.update(min_new_tokens=2000, max_new_tokens=2000)
    before = failures()
    with doomed.client() as http, http.stream("POST", "/inference_zero_shot", json=request) as answer:
        pieces = answer.iter_raw()
        assert next(pieces)
        for _ in range(3):
            assert eventually(kill_decode)
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in pieces:
                pass
    assert failures() == before + 1
