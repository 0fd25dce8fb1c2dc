"""Fixtures shared by several test files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import interpreter
from support.server_process import Server, start_server

torch.backends.cudnn.allow_tf32 = False  # as in the server
if not interpreter.GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any is imported
    interpreter.patch_language_once()

LONGEST = (
    "test_hangs",
    "test_poison",
    "test_recovery",
    "test_lifecycle",
    "test_http_api",
    "test_upstream_weaknesses",
    "test_token2wav",
    "test_scripts",
    "test_decode_stage",
    "test_websocket",
    "test_hift_runner",
    "test_speech_quality",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that with several workers none is left alone with one at the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A folder for sockets, whose paths must be short; `tmp_path` may be too long."""
    with tempfile.TemporaryDirectory(prefix="ltts-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A real server on the small golden checkpoint with two HTTP workers and two decode processes."""
    with start_server(httpserver_workers=2, decode_process_num=2) as running:
        yield running
