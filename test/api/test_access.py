"""API keys, their limits, CORS and TLS, tested from outside."""

from __future__ import annotations

import ssl
import subprocess
import threading
from pathlib import Path

import httpx
import openai
import pytest
import websockets.exceptions
from support.collector import collector
from support.recording_server import recording_server
from support.server_process import PROMPT_TEXT, Server, speak, start_server
from websockets.sync.client import connect

from light_tts.server.core.settings import Settings, SettingsError
from light_tts.server.httpserver import tracing
from light_tts.server.httpserver.access.keys import ApiKeys, presented_key, read_keys
from light_tts.server.httpserver.access.usage import KeyUsage

KEY, OTHER, THIRD = "k-0123456789abcdef", "other-0123456789abcdef", "third-0123456789abcdef"


@pytest.fixture(scope="module")
def files():
    with recording_server() as server:
        yield server


@pytest.fixture(scope="module")
def traces():
    with collector() as server, pytest.MonkeyPatch.context() as environment:
        # A server with three keys, TLS, one allowed origin and one host for remote recordings.
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield server


@pytest.fixture(scope="module")
def locked(tmp_path_factory, files, traces) -> Server:
    """A server with three keys, encrypted, for the pages of one origin, that opens one host's addresses."""
    folder = tmp_path_factory.mktemp("tls")
    (folder / "keys").write_text(f"# ours\n{KEY}\n{OTHER} # theirs\n\n{THIRD}")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=us -keyout key.pem -out cert.pem"
    subprocess.run([*make.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True)
    with start_server(
        api_key_file=folder / "keys",
        key_requests_per_minute=20,
        key_streams=2,
        cors_origins="https://page.example",
        otlp_endpoint=traces.url,
        ref_audio_hosts=f"127.0.0.1:{files.server_port}",
        ssl_certfile=folder / "cert.pem",
        ssl_keyfile=folder / "key.pem",
    ) as running:
        yield running


def trust(server: Server) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(server.flags["ssl_certfile"]))


@pytest.fixture(scope="module")
def http(locked: Server):
    with httpx.Client(base_url=locked.url, verify=trust(locked), timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": KEY}, {"xi-api-key": "é"}],
)
@pytest.mark.parametrize("path", ["/v1/models", "/spk_list", "/no/such/route"])
def test_without_a_key(http, path, headers):
    refused = http.get(path, headers={name: value.encode() for name, value in headers.items()})
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["message"] == refused.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"xi-api-key": OTHER}])
def test_with_a_key(http, headers):
    assert http.get("/v1/models", headers=headers).status_code == 200


def test_state_and_documentation_are_open(http):
    for path in ("/liveness", "/readiness", "/metrics", "/docs", "/openapi.json"):
        assert http.get(path).status_code == 200, path


def test_exception_of_the_client(locked):
    with (
        httpx.Client(verify=trust(locked)) as plain,
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", http_client=plain) as client,
        pytest.raises(openai.AuthenticationError, match="key"),
    ):
        client.models.list()


def test_websockets_need_a_key_too(locked):
    address = f"{locked.url.replace('https', 'wss')}/inference_bistream"
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        connect(address, ssl=trust(locked))
    assert refused.value.response.status_code == 401
    with connect(address, ssl=trust(locked), additional_headers={"xi-api-key": KEY}) as session:
        session.send('{"spk_id": "tiny_spk", "max_new_tokens": 10}')
        session.send('{"tts_text": "Hello.", "finish": true}')
        assert session.recv()
    offered = ["realtime", f"openai-insecure-api-key.{KEY}"]  # as a browser must
    with connect(address, ssl=trust(locked), subprotocols=offered) as session:
        assert session.subprotocol == "realtime"


def test_streams_at_once(locked, http):
    address = f"{locked.url.replace('https', 'wss')}/inference_bistream"
    headers = {"xi-api-key": OTHER}
    with (
        connect(address, ssl=trust(locked), additional_headers=headers, open_timeout=60),
        connect(address, ssl=trust(locked), additional_headers=headers, open_timeout=60),
    ):
        refused = http.get("/v1/models", headers=headers)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert http.get("/v1/models", headers={"xi-api-key": KEY}).status_code == 200
    ended = threading.Event()
    while http.get("/v1/models", headers=headers).status_code == 429:
        assert not ended.wait(0.1)


def test_requests_a_minute(http):
    headers = {"xi-api-key": THIRD}
    codes = [http.get("/v1/models", headers=headers).status_code for _ in range(22)]
    assert codes[:20] == [200] * 20 and codes[21] == 429


def test_pages_of_the_origin(http):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ours, theirs = (
        http.options("/v1/audio/speech", headers={**asked, "Origin": origin})
        for origin in ("https://page.example", "https://other.example")
    )
    assert ours.status_code == 200
    assert ours.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in theirs.headers


def test_speech_over_tls(locked, http):
    http.headers["Authorization"] = f"Bearer {KEY}"
    assert len(speak(http, "Hello there.", stream=True, max_new_tokens=40).content) > 1000
    big = http.post("/v1/audio/speech", content=b" " * (21 << 20))
    assert big.status_code == 413
    del http.headers["Authorization"]


def test_a_recording_by_its_address(http, files):
    place = f"http://127.0.0.1:{files.server_port}"
    request = {"input": "Hello.", "ref_text": PROMPT_TEXT, "max_new_tokens": 20, "response_format": "pcm"}
    spoken, refused = (
        http.post(
            "/v1/audio/speech",
            json={**request, "ref_audio": f"{place}{path}"},
            headers={"Authorization": f"Bearer {KEY}"},
        )
        for path in ("/voice.wav?a=b", "/none")
    )
    assert spoken.status_code == 200 and len(spoken.content) > 1000
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "ref_audio"


def test_a_trace_of_all_stages_below_the_one_of_the_client(http, traces):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    answer = http.post(
        "/v1/audio/speech",
        json={"input": "Hello there.", "max_new_tokens": 40, "response_format": "pcm"},
        headers={"Authorization": f"Bearer {KEY}", "traceparent": f"00-{trace}-{parent}-01"},
    )
    assert answer.status_code == 200
    spans = traces.trace(trace, 4)
    assert set(spans) == {"openai_speech", "encode", "llm", "decode"}
    root = spans.pop("openai_speech")
    assert root.parent_span_id.hex() == parent
    about = {entry.key: entry.value.string_value for entry in root.attributes}
    assert about["light_tts.request_id"] == answer.headers["x-request-id"]
    assert about["light_tts.outcome"] == "ok"
    for span in spans.values():
        assert span.parent_span_id == root.span_id
        begin, end = span.start_time_unix_nano, span.end_time_unix_nano
        assert root.start_time_unix_nano <= begin <= end <= root.end_time_unix_nano
    assert spans["encode"].start_time_unix_nano <= spans["llm"].start_time_unix_nano
    assert spans["llm"].start_time_unix_nano <= spans["decode"].start_time_unix_nano


@pytest.mark.parametrize(
    ("endpoint", "installed", "reason"),
    [
        ("localhost:4318", True, "must start with http"),
        ("http://localhost:4318", False, r"light-tts\[otel\]"),
    ],
)
def test_tracing_that_cannot_be(monkeypatch, endpoint, installed, reason):
    if not installed:
        monkeypatch.setattr(tracing, "EXPORTER", "no_such_package.exporter")
    with pytest.raises(SettingsError, match=reason):
        tracing.check_tracing(Settings(otlp_endpoint=endpoint))


def test_without_keys_everything_is_open_and_no_page_is_let_in(server):
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://page.example"})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


# -- without a server


def test_keys_of_flag_variable_and_file(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(f"{THIRD}\n")
    settings = Settings(api_key=KEY, api_key_file=str(file))
    keys = read_keys(settings, {"LIGHT_TTS_API_KEYS": f"{OTHER}, {KEY}"})
    assert len(keys) == 3 and keys.index("") is None and keys.index(KEY + "x") is None
    assert {keys.index(key) for key in (KEY, OTHER, THIRD)} == {0, 1, 2}


@pytest.mark.parametrize("content", ["", "# nothing\n", "short", "with a blank in it", "schlüssel-01234567"])
def test_files_without_a_usable_key(tmp_path: Path, content: str):
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(SettingsError, match=r"--api_key_file .*keys"):
        read_keys(Settings(api_key_file=str(file)), {})
    with pytest.raises(SettingsError, match="No such file"):
        read_keys(Settings(api_key_file=str(file) + "x"), {})


def test_what_counts_as_presented():
    assert presented_key({"authorization": "bearer  abc "}) == "abc"
    assert presented_key({"authorization": "Basic abc"}) == ""
    assert presented_key({"sec-websocket-protocol": "realtime, openai-insecure-api-key.abc"}) == "abc"
    assert ApiKeys([KEY]).index(presented_key({"xi-api-key": KEY})) == 0


def test_rates_are_those_of_the_last_minute_over_all_workers(tmp_path: Path):
    first, second = (KeyUsage(tmp_path, 2, slot) for slot in (0, 1))
    for usage in (first, first, second):
        usage.begin(1, now=600.0)
    assert first.rate(1, 659.0) == 3 and first.rate(0, 659.0) == 0
    assert second.rate(1, 690.0) == pytest.approx(1.5)
    second.begin(1, now=690.0)
    assert first.rate(1, 690.0) == pytest.approx(2.5) and first.rate(1, 900.0) == 0
    assert first.open_requests(1) == 4
    second.end(1)
    KeyUsage(tmp_path, 2, 0)  # a new worker in the place of a dead one
    assert second.open_requests(1) == 1
