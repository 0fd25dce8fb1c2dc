"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import interpreter
import pytest
import torch
from server_process import Server, start_server

torch.backends.cudnn.allow_tf32 = False  # as in the server
if not interpreter.GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any is imported
    interpreter.patch_language_once()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A real server on the small golden checkpoint with two HTTP workers and two decode processes."""
    with start_server(httpserver_workers=2, decode_process_num=2) as running:
        yield running
