"""A server that takes the port over from a running one: nobody is refused, nothing is cut off."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import httpx
import psutil
from support.server_process import FEW_STEPS, launch, speak, start_server
from system.test_lifecycle import eventually, stream_in_background

# So short that the old server need not wait long for clients that are connected and say nothing.
SHORT = {"header_timeout": 2, "idle_timeout": 2, **FEW_STEPS}


class Clients:
    """Clients that ask all the time: `keeping` over one connection each, else each time over a new one."""

    def __init__(self, url: str) -> None:
        self.answers: list[int | httpx.HTTPError] = []
        self._over = threading.Event()
        kinds = [("/liveness", True), ("/liveness", False), ("speech", True), ("speech", False)]
        self._threads = [threading.Thread(target=self._ask, args=(url, *kind)) for kind in kinds]

    def _ask(self, url: str, what: str, keeping: bool) -> None:
        limits = httpx.Limits(max_keepalive_connections=1 if keeping else 0)
        with httpx.Client(base_url=url, timeout=60, limits=limits) as client:
            while not self._over.wait(0.02):
                try:
                    answer = (
                        speak(client, "Hello.", max_new_tokens=10) if what == "speech" else client.get(what)
                    )
                    self.answers.append(answer.status_code)
                except httpx.HTTPError as error:
                    self.answers.append(error)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join(60)


def test_a_server_takes_the_port_over_and_no_request_fails():
    with start_server(httpserver_workers=2, replace=True, **SHORT) as old:  # where there is none: a start
        stream, result, speaking = stream_in_background(old)
        assert speaking.wait(60)
        clients = Clients(old.url)
        with launch(wait=False, port=old.port, replace=True, **SHORT) as new, clients.asking():
            assert old.process.wait(120) == 0, old.output
            stream.join(60)
            assert result.get("status") == 200 and "error" not in result, result
            assert "taken over the port" in old.output
            served_by_new = len(clients.answers) + 8
            assert eventually(lambda: len(clients.answers) >= served_by_new, 60)
            assert not list((old.directory / "ipc").glob("light_tts-*"))
            assert list((new.directory / "ipc").glob("light_tts-*"))
            assert new.readiness().status_code == 200
        assert set(clients.answers) == {200}
        assert not new.leftovers()


def test_a_server_that_cannot_start_leaves_the_running_one_alone(server):
    with launch(wait=False, port=server.port, replace=True, log_dir="/proc/none") as failing:
        assert failing.process.wait(60) == 1
        assert "--log_dir /proc/none" in failing.output
    with launch(wait=False, port=server.port, replace=True) as killed:
        assert eventually(lambda: len(psutil.Process(killed.pid).children()) > 0, 60)
        os.kill(killed.pid, signal.SIGKILL)
        killed.process.wait(10)
    with server.client() as client:
        assert speak(client, "Hello.").status_code == 200
    assert server.readiness().status_code == 200


def test_only_one_server_can_take_over_and_only_at_the_same_address(server):
    with launch(wait=False, port=server.port, replace=True, host="127.0.0.2") as elsewhere:
        assert elsewhere.process.wait(60) == 1
        assert "listens on 127.0.0.1, not on --host 127.0.0.2" in elsewhere.output
    with launch(wait=False, port=server.port, replace=False) as second:
        assert second.process.wait(60) == 1
        assert f"--port {server.port}" in second.output
