"""The HTTP routes of a real server, tested from outside."""

from __future__ import annotations

import base64
import io
import re
import struct
import threading
import time
import wave
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import soundfile
from support.server_process import FEW_STEPS, PROMPT_TEXT, PROMPT_WAV, Server, speak, start_server
from support.waiting import eventually

TOKEN_SAMPLES = 960  # 24 kHz, 25 tokens a second
EXACTLY_40 = {"min_new_tokens": 40, "max_new_tokens": 40}
TEXT = "Hello there, how are you today?"


@pytest.fixture(scope="module")
def server(mortal_server: Server) -> Server:
    mortal_server.wait_until_ready()  # other files kill its processes
    return mortal_server


@pytest.fixture()
def client(server: Server):
    with server.client() as http:
        yield http


@pytest.fixture
def strict(strict_server: Server) -> Server:
    return strict_server


@pytest.fixture(scope="module")
def narrow():
    """A server that takes two requests at a time and keeps the result of a health check for a minute."""
    with start_server(
        max_pending_requests=2,
        decode_process_num=2,
        httpserver_workers=2,
        health_cache_seconds=60,
        **FEW_STEPS,
    ) as running:
        yield running


def as_json(text: str, **fields) -> dict:
    body = {"tts_text": text, "prompt_text": PROMPT_TEXT, "max_new_tokens": 40, "min_new_tokens": 1}
    body["prompt_wav"] = base64.b64encode(PROMPT_WAV.read_bytes()).decode()
    return {**body, **fields}


def sound_file(seconds: float, rate: int = 24000) -> bytes:
    samples = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * rate))
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), rate, format="WAV")
    return file.getvalue()


# -- what is spoken


def test_the_answer_is_raw_pcm_with_headers_that_say_so(client):
    answer = speak(client, TEXT, **EXACTLY_40)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "audio/L16;rate=24000;channels=1"
    assert answer.headers["x-sample-rate"] == "24000"
    assert answer.headers["x-request-id"]
    assert int(answer.headers["content-length"]) == len(answer.content) == 40 * TOKEN_SAMPLES * 2


def test_a_wav_has_a_right_header(client):
    pcm = speak(client, TEXT, seed=3).content
    answer = speak(client, TEXT, seed=3, format="wav")
    assert answer.headers["content-type"] == "audio/wav"
    with wave.open(io.BytesIO(answer.content)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        assert file.readframes(file.getnframes()) == pcm


def test_a_streamed_wav_says_that_its_length_is_unknown(client):
    answer = speak(client, TEXT, seed=3, format="wav", stream=True)
    assert struct.unpack_from("<I", answer.content, 4) == (0xFFFFFFFF,)
    assert struct.unpack_from("<I", answer.content, 40) == (0xFFFFFFFF,)
    assert answer.content[44:] == speak(client, TEXT, seed=3, stream=True).content


def test_the_same_seed_gives_the_same_audio_and_another_seed_does_not(client):
    first, again, other = (speak(client, TEXT, seed=seed).content for seed in (7, 7, 8))
    assert first == again != other


SAMPLINGS = [
    {"top_p": 0.1},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 1, "win_size": 50, "tau_r": 0.02},
    {"top_p": 1.0, "top_k": 64, "temperature": 0.5, "win_size": 1, "tau_r": 2},
]


def test_sampling_can_be_chosen_for_each_request(server, client):
    """The checkpoint's parameters by default; concurrent requests keep their own."""
    defaults = {"top_p": 0.8, "top_k": 25, "temperature": 1.0, "win_size": 10, "tau_r": 0.1}

    def one(sampling: dict) -> bytes:
        with server.client() as http:
            return speak(http, TEXT, seed=3, **sampling).content

    alone = [one(sampling) for sampling in ({}, *SAMPLINGS)]
    assert one(defaults) == alone[0] and len(set(alone)) == len(alone)
    assert client.post("/inference_zero_shot", json=as_json(TEXT, seed=3, **SAMPLINGS[0])).content == alone[1]
    with ThreadPoolExecutor(6) as clients:
        assert list(clients.map(one, ({}, *SAMPLINGS))) == alone


def test_the_seed_of_a_request_without_one_is_told(client):
    first = speak(client, TEXT)
    assert speak(client, TEXT, seed=first.headers["x-seed"]).content == first.content


def test_json_and_form_give_the_same_audio(client):
    by_form = speak(client, TEXT, seed=5).content
    by_json = client.post("/inference_zero_shot", json=as_json(TEXT, seed=5))
    assert by_json.status_code == 200, by_json.text
    assert by_json.content == by_form


def test_streamed_audio_comes_in_pieces_and_completely(server):
    arrivals = []
    fields = as_json(TEXT, stream=True, min_new_tokens=200, max_new_tokens=200)
    with server.client() as http, http.stream("POST", "/inference_zero_shot", json=fields) as answer:
        assert "content-length" not in answer.headers
        for piece in answer.iter_raw():
            arrivals.append((time.monotonic(), len(piece)))
    assert sum(size for _, size in arrivals) == 200 * TOKEN_SAMPLES * 2
    assert len(arrivals) > 3
    assert arrivals[-1][0] > arrivals[0][0]


def test_speed_changes_the_length(client):
    assert len(speak(client, TEXT, speed=2.0, seed=1, **EXACTLY_40).content) == pytest.approx(
        20 * TOKEN_SAMPLES * 2, rel=0.05
    )


def test_a_long_text_is_spoken_in_parts(client):
    text = " ".join(f"This is sentence number {n} of a rather long text, is it not?" for n in range(12))
    samples = len(speak(client, text, min_new_tokens=10, max_new_tokens=10).content) // 2
    parts, rest = divmod(samples, 10 * TOKEN_SAMPLES)
    assert parts > 1 and rest == 0


def test_a_long_text_streams_the_same_number_of_samples(client):
    text = " ".join(f"This is sentence number {n} of a rather long text, is it not?" for n in range(12))
    limits = {"min_new_tokens": 30, "max_new_tokens": 30}
    assert len(speak(client, text, stream=True, **limits).content) == len(
        speak(client, text, **limits).content
    )


def test_concurrent_requests_on_several_workers_get_their_own_answers(server):
    def one(seed: int) -> bytes:
        with server.client() as http:
            return speak(http, TEXT, seed=seed, stream=seed % 2 == 0).content

    alone = [one(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(one, range(8)))
    for audio, expected in zip(together, alone, strict=True):
        assert len(audio) == len(expected)
        difference = np.frombuffer(audio, np.int16).astype(int) - np.frombuffer(expected, np.int16)
        assert np.abs(difference).max() <= 2


# -- what is refused


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"stream": True, "speed": 1.5}, 400, "speed change only support non-stream inference mode"),
        ({"tts_model_name": "nobody"}, 400, "unknown tts_model_name 'nobody'; known are default, cosyvoice"),
        ({"tts_text": ""}, 400, "tts_text is empty"),
        ({"tts_text": " \n"}, 400, "tts_text is empty"),
        ({"tts_text": "x" * 5001}, 400, "tts_text has 5001 characters"),
        ({"tts_text": "a\0b"}, 400, "null character"),
        ({"tts_text": None}, 422, "tts_text"),
        ({"tts_text": 5}, 422, "tts_text"),
        ({"tts_txt": "Hi."}, 422, "tts_txt: unknown field; did you mean tts_text?"),
        ({"finish": ""}, 422, "finish: unknown field; known are prompt_text, prompt_wav, spk_id"),
        ({"x" * 10_000: 1}, 422, "x" * 64 + ": unknown field"),
        ({"prompt_text": None}, 422, "prompt_text: goes with prompt_wav"),
        (
            {"prompt_wav": None},
            422,
            "no voice was given: name one with spk_id",
        ),
        ({"prompt_wav": "%%%"}, 422, "base64"),
        ({"prompt_wav": base64.b64encode(b"no sound").decode()}, 400, "audio file format is incorrect"),
        ({"spk_id": "tiny_spk"}, 400, "not both"),
        ({"spk_id": "nobody", "prompt_wav": None}, 400, "unknown spk_id"),
        ({"spk_id": "../../etc/passwd", "prompt_wav": None}, 400, "spk_id"),
        ({"speed": 0.4}, 422, "speed"),
        ({"speed": 2.1}, 422, "speed"),
        ({"speed": "fast"}, 422, "speed"),
        ({"seed": -1}, 422, "seed"),
        ({"seed": 2**32}, 422, "seed"),
        ({"format": "ogg"}, 422, "format"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, 400, "min_new_tokens"),
        ({"top_p": 0}, 422, "top_p: Input should be greater than 0"),
        ({"top_p": 1.01}, 422, "top_p: Input should be less than or equal to 1"),
        ({"top_k": 0}, 422, "top_k: Input should be greater than or equal to 1"),
        ({"top_k": 65}, 422, "top_k: Input should be less than or equal to 64"),
        ({"top_k": 2.5}, 422, "top_k"),
        ({"temperature": 0}, 422, "temperature: Input should be greater than or equal to 0.1"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"win_size": 51}, 422, "win_size: Input should be less than or equal to 50"),
        ({"tau_r": 0}, 422, "tau_r: Input should be greater than 0"),
        ({"tau_r": 2.1}, 422, "tau_r: Input should be less than or equal to 2"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(client, fields, status, message):
    body = {name: value for name, value in as_json(TEXT, **fields).items() if value is not None}
    answer = client.post("/inference_zero_shot", json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["message"]


@pytest.mark.parametrize(
    ("recording", "reason"),
    [
        (sound_file(0.4), "0.5 s"),
        (sound_file(31), "longer"),
        (sound_file(1, rate=8000), "8000 Hz"),
        (PROMPT_WAV.read_bytes()[:40], "this is a WAV file that is damaged"),
        (b"", "WAV, FLAC, OGG, MP3 and AIFF can be read, this is empty"),
        (b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(40), "this is M4A"),
        (b"\0\0\0\x20ftypisom\0\0\0\0" + bytes(40), "this is MP4"),
        (b"\x1aE\xdf\xa3" + bytes(range(200, 256)), "this is WebM"),
        (b"#!AMR\n" + bytes(50), "this is AMR"),
        (b"\n<!DOCTYPE html><title>Not found</title>", "this is an HTML page"),
        (b'{"message": "Not found"}', "this is JSON"),
        ("здравствуйте".encode(), "this is text"),
        (bytes(1000), "this is nothing but zero bytes"),
        (bytes(range(150, 250)), "this is of an unknown type"),
    ],
)
def test_a_recording_that_cannot_be_used_is_refused(client, recording, reason):
    answer = client.post(
        "/inference_zero_shot",
        data={"tts_text": TEXT, "prompt_text": PROMPT_TEXT},
        files={"prompt_wav": ("a.wav", recording)},
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["message"].startswith("audio file format is incorrect")
    assert reason in answer.json()["message"]


def test_a_form_field_that_cannot_act_is_refused_by_name(client):
    answer = client.post(
        "/inference_zero_shot",
        data={"tts_text": TEXT, "spk_id": "tiny_spk", "promt_text": "Hi."},
        files={"prompt_wave": ("a.wav", b"x" * 100)},
    )
    assert answer.status_code == 422
    assert "promt_text: unknown field; did you mean prompt_text?" in answer.json()["message"]
    assert "prompt_wave: unknown field; did you mean prompt_wav?" in answer.json()["message"]


def test_the_name_of_a_recording_instead_of_the_recording_is_explained(client):
    fields = {
        "tts_text": (None, TEXT),
        "prompt_text": (None, PROMPT_TEXT),
        "prompt_wav": (None, "my voice.wav"),
    }
    answer = client.post("/inference_zero_shot", files=fields)
    assert answer.status_code == 422
    assert "-F prompt_wav=@my voice.wav" in answer.json()["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"tts_text": "\\ud800"}', b"\xff\xfe", b"[" * 100_000])
def test_bad_json_is_refused(client, body):
    answer = client.post("/inference_zero_shot", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "JSON" in answer.json()["message"]


def test_other_bodies_are_refused(client):
    answer = client.post("/inference_zero_shot", content=b"hello", headers={"content-type": "text/plain"})
    assert answer.status_code == 415


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_description_of_the_api_needs_nothing_from_outside(client, page):
    html = client.get(page).text
    assert "://" not in html
    addresses = re.findall(r"""(?:src|href|url|spec-url)[=:] ?["']([^"']+)""", html)
    assert "/openapi.json" in addresses
    for address in addresses:
        answer = client.get(address)
        assert (answer.status_code, len(answer.content) > 500) == (200, True), address
    assert any(address.endswith(".js") for address in addresses)


def test_an_unknown_route_answers_with_a_message(client):
    answer = client.get("/nothing")
    assert (answer.status_code, answer.json()) == (404, {"message": "Not Found"})


# -- limits


def test_a_body_above_the_limit_is_refused(strict):
    with strict.client() as http:
        announced = http.post("/inference_zero_shot", files={"prompt_wav": b"x" * 600_000})
        unannounced = http.post(
            "/inference_zero_shot",
            content=(b"x" * 10_000 for _ in range(60)),
            headers={"content-type": "application/json"},
        )
    for answer in (announced, unannounced):
        assert answer.status_code == 413
        assert "0.5 MiB" in answer.json()["message"]


def test_text_and_prompt_limits_are_those_of_the_flags(strict):
    with strict.client() as http:
        assert "at most 60" in speak(http, "x" * 61).json()["message"]
        answer = http.post(
            "/inference_zero_shot",
            data={"tts_text": TEXT, "prompt_text": PROMPT_TEXT},
            files={"prompt_wav": ("a.wav", sound_file(5.5))},
        )
    assert answer.status_code == 400
    assert "5 s" in answer.json()["message"]


@pytest.mark.parametrize("name", ["min_new_tokens", "max_new_tokens"])
def test_tokens_beyond_the_longest_part_are_refused(strict, name):
    with strict.client() as http:
        answer = speak(http, TEXT, **{"min_new_tokens": None, "max_new_tokens": None, name: 3501})
    assert answer.status_code == 400
    assert f"{name} 3501" in answer.text and "--max_part_tokens" in answer.text


ENDLESS = {"min_new_tokens": 3500, "max_new_tokens": 3500}


def test_a_request_beyond_its_deadline_gets_504(strict):
    with strict.client() as http:
        begun = time.monotonic()
        answer = speak(http, TEXT, **ENDLESS)
    assert answer.status_code == 504, answer.text
    assert time.monotonic() - begun < 6
    assert eventually(lambda: strict.metric("light_tts_llm_running_requests") == 0)


def test_a_stream_beyond_its_deadline_is_cut_so_that_the_client_notices(strict):
    def begun_and_cut() -> bool:
        """Return whether a stream was cut. A busy machine may take longer than its deadline to begin one."""
        with http.stream("POST", "/inference_zero_shot", json=fields) as answer:
            if answer.status_code == 504:
                return False
            assert answer.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in answer.iter_raw():
                    pass
        return True

    fields = as_json(TEXT, stream=True, **ENDLESS)
    with strict.client() as http:
        assert eventually(begun_and_cut, 60)
    assert strict.metric("light_tts_requests_total", outcome="timeout") >= 1


def test_requests_beyond_the_limit_get_429_and_do_not_disturb_those_in_work(narrow):
    fields = as_json(TEXT, stream=True, min_new_tokens=200, max_new_tokens=200)
    both_begun = threading.Barrier(3)

    def occupy() -> int:
        with narrow.client() as http, http.stream("POST", "/inference_zero_shot", json=fields) as answer:
            pieces = answer.iter_raw()
            size = len(next(pieces))
            both_begun.wait(60)
            return size + sum(len(piece) for piece in pieces)

    with ThreadPoolExecutor(2) as threads, narrow.client() as http:
        occupied = [threads.submit(occupy) for _ in range(2)]
        both_begun.wait(60)
        refused = [speak(http, TEXT) for _ in range(3)]
        assert [job.result() for job in occupied] == [200 * TOKEN_SAMPLES * 2] * 2
        assert [answer.status_code for answer in refused] == [429] * 3
        assert int(refused[0].headers["retry-after"]) >= 1
        assert eventually(lambda: speak(http, TEXT).status_code == 200)


def test_a_client_that_goes_away_frees_its_work(server):
    before = server.metric("light_tts_requests_total", outcome="disconnected")
    with (
        server.client() as http,
        http.stream("POST", "/inference_zero_shot", json=as_json(TEXT, stream=True, **ENDLESS)) as answer,
    ):
        next(answer.iter_raw())
    assert eventually(lambda: server.metric("light_tts_requests_total", outcome="disconnected") == before + 1)
    assert eventually(lambda: server.metric("light_tts_llm_running_requests") == 0)
    assert server.metric("light_tts_llm_kv_slots_used") == 0


# -- operation


def test_the_styles_can_be_asked(client):
    assert client.get("/query_tts_model").json() == {"tts_models": ["cosyvoice"]}
    assert client.post("/query_tts_model").json() == {"tts_models": ["cosyvoice"]}


def test_a_running_server_is_live_ready_and_healthy(client):
    assert client.get("/liveness").json() == {"status": "ok"}
    ready = client.get("/readiness")
    assert ready.status_code == 200
    stages = {(stage["stage"], stage["index"]): stage["state"] for stage in ready.json()["stages"]}
    assert stages == dict.fromkeys([("encode", 0), ("llm", 0), ("decode", 0), ("decode", 1)], "up")
    for path in ("/health", "/healthz"):
        health = client.get(path)
        assert (health.status_code, health.json()) == (200, {"message": "Ok"})


def test_health_speaks_through_every_decode_process(server, narrow):
    spoken = server.metric("light_tts_requests_total", route="health")
    with narrow.client() as http:  # one connection: another HTTP worker would make a check of its own
        assert http.get("/health").status_code == 200
        first = narrow.metric("light_tts_requests_total", route="health", outcome="ok")
        assert first >= 2
        assert http.get("/health").status_code == 200
    assert narrow.metric("light_tts_requests_total", route="health") == first
    assert server.metric("light_tts_requests_total", route="health") == spoken


def test_metrics_are_summed_over_all_processes(server, client):
    before = {
        name: server.metric(name)
        for name in (
            "light_tts_audio_seconds_total",
            "light_tts_llm_tokens_total",
            "light_tts_prompt_cache_hits_total",
        )
    }
    route = {"route": "zero_shot"}
    requests = server.metric("light_tts_requests_total", **route, outcome="ok")
    for _ in range(4):
        with server.client() as fresh:  # other connections, other workers
            assert speak(fresh, TEXT, **EXACTLY_40).status_code == 200
    assert server.metric("light_tts_requests_total", **route, outcome="ok") == requests + 4
    after = {name: server.metric(name) for name in before}
    assert after["light_tts_audio_seconds_total"] - before["light_tts_audio_seconds_total"] == pytest.approx(
        6.4
    )
    assert after["light_tts_llm_tokens_total"] - before["light_tts_llm_tokens_total"] >= 160
    assert after["light_tts_prompt_cache_hits_total"] > before["light_tts_prompt_cache_hits_total"]
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    for name in (
        "request_duration_seconds_bucket",
        "time_to_first_audio_seconds_bucket",
        "stage_queue_depth",
    ):
        assert f"light_tts_{name}" in answer.text


def test_every_request_logs_one_line_with_its_cost(server, client):
    answer = speak(client, TEXT, **EXACTLY_40)
    request_id = answer.headers["x-request-id"]
    assert eventually(lambda: request_id in server.output)
    (line,) = [line for line in server.output.splitlines() if f"{request_id} route=" in line]
    assert "route=zero_shot outcome=ok audio=1.60s ttfa=" in line
    assert f" seed={answer.headers['x-seed']} cost_time " in line
    assert line.split(" cost_time ")[1].endswith("ms")
