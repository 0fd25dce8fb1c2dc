"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_process import Server, start_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A real server on the small golden checkpoint with two HTTP workers and two decode processes."""
    with start_server(httpserver_workers=2, decode_process_num=2) as running:
        yield running
