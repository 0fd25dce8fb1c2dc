"""The gunicorn worker class: uvicorn's, with this server's signal handling."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from functools import partial
from typing import Any

from gunicorn.arbiter import Arbiter
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from light_tts.server.core.stop_signal import LEAVE_TO_OTHERS, STOP_WORKER

LAST_BYTES_SECONDS = 2  # time for connections to send pending data after the server has drained


class _Server(Server):
    def handle_exit(self, sig: int, frame: Any) -> None:
        """Ignore SIGINT and SIGTERM: the front process decides when a worker ends."""


class HttpWorker(UvicornWorker):
    CONFIG_KWARGS = {  # noqa: RUF012 (declared so by the base class)
        "loop": "uvloop",
        "lifespan": "on",
        "access_log": False,
        "timeout_graceful_shutdown": LAST_BYTES_SECONDS,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("uvicorn.error", "uvicorn.access"):
            logger = logging.getLogger(name)
            logger.handlers = []
            logger.propagate = True
            logger.setLevel(logging.WARNING)

    def init_signals(self) -> None:
        super().init_signals()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    async def _serve(self) -> None:
        # Imported late: it loads the metrics, whose directory is set only after the front process has
        # started.
        from light_tts.server.connections.gate import Gate
        from light_tts.server.connections.http import LimitedHttp
        from light_tts.server.connections.websocket import LimitedWebSocket

        gate = Gate(self.wsgi.state.settings)
        self.config.app = self.wsgi
        self.config.http = partial(LimitedHttp, gate=gate)
        self.config.ws = partial(LimitedWebSocket, gate=gate)
        server = _Server(config=self.config)

        def stop() -> None:
            server.should_exit = True

        def leave_to_others() -> None:
            gate.leaving = True
            for listening in server.servers:
                listening.close()
            for connection in server.server_state.connections:
                if isinstance(connection, LimitedHttp):
                    connection.end_with_answer()

        def quit_now() -> None:
            server.should_exit = server.force_exit = True

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(STOP_WORKER, stop)
        loop.add_signal_handler(LEAVE_TO_OTHERS, leave_to_others)
        loop.add_signal_handler(signal.SIGQUIT, quit_now)
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
