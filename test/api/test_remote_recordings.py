"""Recordings given by URL: which are fetched, and the errors for the others."""

from __future__ import annotations

import asyncio
import socket

import pytest
from support.recording_server import recording_server
from support.server_process import PROMPT_WAV

from light_tts.server.core.settings import Settings
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.remote_recordings import RemoteRecordings


@pytest.fixture(scope="module")
def files():
    with recording_server() as server:
        yield server


def read(url: str, hosts: str) -> bytes:
    settings = Settings(ref_audio_hosts=hosts, max_upload_mb=2, body_timeout=0.5)

    async def run() -> bytes:
        return await RemoteRecordings(settings).read(url)

    return asyncio.run(run())


def refusal(url: str, hosts: str) -> tuple[int, str]:
    with pytest.raises(RequestError) as refused:
        read(url, hosts)
    assert refused.value.field == "ref_audio"
    return refused.value.status, refused.value.message


def test_a_listed_address(files):
    place = f"127.0.0.1:{files.server_port}"
    assert read(f"http://{place}/voice.wav?a=b#c", f"example.com, {place}") == PROMPT_WAV.read_bytes()
    assert files.asked[-1] == ("/voice.wav?a=b", place)


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/moved", 400, "leads to another"),
        ("/large", 413, "larger than 2 MiB"),
        ("/slow", 408, "did not arrive within 0.5 s"),
        ("/none", 400, "answered 404"),
    ],
)
def test_answers_that_are_not_taken(files, path, status, reason):
    place = f"127.0.0.1:{files.server_port}"
    before = len(files.asked)
    code, message = refusal(f"http://{place}{path}", place)
    assert code == status and reason in message
    assert len(files.asked) == before + 1  # no redirect was followed


@pytest.mark.parametrize(
    ("url", "hosts", "reason"),
    [
        ("http://files.example/a.wav", "", "URLs are not fetched here"),
        ("http://files.example/a.wav", "example", "not in --ref_audio_hosts"),
        ("http://files.example:81/a.wav", "files.example", "not in --ref_audio_hosts"),
        ("http://files.example/a.wav", "files.example:81", "not in --ref_audio_hosts"),
        ("http://me:secret@files.example/a.wav", "files.example", "a user or a password"),
        ("http://127.0.0.1/a.wav", "localhost", "not in --ref_audio_hosts"),
        ("http://[::1]/a.wav", "127.0.0.1", "not in --ref_audio_hosts"),
        ("ftp://files.example/a.wav", "files.example", "begins with https://"),
        ("file:///etc/passwd", "files.example", "begins with https://"),
        ("http://files.example:x/a.wav", "files.example", "begins with https://"),
    ],
)
def test_addresses_that_are_not_opened(url, hosts, reason):
    status, message = refusal(url, hosts)
    assert status == 400 and reason in message


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::ffff:127.0.0.1", "fd00::1"]
)
def test_a_name_of_an_address_that_is_not_public(files, monkeypatch, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    public, found = (socket.AF_INET, 1, 6, "", ("93.184.216.34", 80)), (family, 1, 6, "", (address, 80))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: [public, found])
    status, message = refusal("http://files.example/a.wav", "files.example")
    assert status == 400 and "not public" in message


def test_what_was_checked_is_what_is_connected_to(monkeypatch, files):
    """A name that resolves to another address the second time."""
    answers = iter([[(socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: next(answers))
    monkeypatch.setattr("light_tts.server.httpserver.remote_recordings._is_public", lambda address: True)
    port = files.server_port
    url = f"http://files.example:{port}/voice.wav?a=b"
    assert read(url, f"files.example:{port}") == PROMPT_WAV.read_bytes()
    assert files.asked[-1][1] == f"files.example:{port}"
