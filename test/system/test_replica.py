"""The server of a replica, without Ray: it is restarted after it has been killed."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import httpx
import psutil
import pytest
from support.processes import command_line
from support.server_process import CHECKPOINT, SMALL

from light_tts.scale.replica import ReplicaServer, ServerGone

PROGRAM = "light_tts.server.api_server"


def flags(directory: Path) -> list[str]:
    values = {"model_dir": CHECKPOINT, "zmq_mode": f"ipc://{directory}/", "spk_dir": directory / "voices"}
    return [word for name, value in (values | SMALL).items() for word in (f"--{name}", str(value))]


def hold(port: int) -> socket.socket:
    """Listen on this port as soon as it is free."""
    while True:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
            listening.listen()
            return listening
        except OSError:
            listening.close()
            time.sleep(0.05)


def test_a_server_that_is_killed_is_restarted_once_its_port_is_free(socket_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = ReplicaServer(flags(socket_path), str(socket_path))

    async def restart(listening: socket.socket) -> None:
        check = asyncio.create_task(server.check())
        await asyncio.sleep(1.5)
        listening.close()
        await check
        async with httpx.AsyncClient(base_url=server.url) as client:
            while True:
                await server.check()
                try:
                    if (await client.get("/readiness")).is_success:
                        return
                except httpx.TransportError:
                    await asyncio.sleep(0.2)

    try:
        # other tests' servers may be children of this process as well
        own = {PROGRAM, f"ipc://{socket_path}/"}
        [front] = [child for child in psutil.Process().children() if own <= set(command_line(child))]
        front.kill()
        while front.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        # Its workers may listen longer than it lives; here this test does.
        listening = hold(int(server.url.rpartition(":")[2]))
        asyncio.run(asyncio.wait_for(restart(listening), 240))
    finally:
        server.stop(60)


def test_a_server_that_cannot_start_is_an_error(socket_path):
    with pytest.raises(ServerGone, match="code"):
        ReplicaServer(["--model_dir", str(socket_path / "none")], str(socket_path))
