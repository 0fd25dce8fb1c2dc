"""Startup and shutdown, shared by both entry points (api_server.py and wsgi_wrapper.py).

The front process is gunicorn's master. It starts the supervisor, waits until the stages are up, and only then
lets gunicorn listen. From then on it handles gunicorn's signals: SIGTERM and Ctrl-C drain, a second Ctrl-C
stops at once.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gunicorn import glogging
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from light_tts.common import log as logs
from light_tts.common import process
from light_tts.common.garbage import spare_present_objects
from light_tts.server.api_cli import Parsed
from light_tts.server.core import open_files
from light_tts.server.core import settings as settings_file
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings, SettingsError
from light_tts.server.core.stop_signal import LEAVE_TO_OTHERS, STOP_WORKER
from light_tts.server.core.styles import StyleError, load_styles
from light_tts.server.httpserver.access.keys import read_keys
from light_tts.server.httpserver.openai.aliases import read_aliases
from light_tts.server.supervision import janitor, mps, takeover
from light_tts.server.supervision.control import Control

TIMEOUT = 300  # seconds without a heartbeat after which gunicorn kills an HTTP worker
STOP_SECONDS = 5.0  # time for the HTTP workers to exit, then for the supervisor
LONGEST_SOCKET_PATH = 107  # bytes, a limit of Linux
LONGEST_NAME = len("/http-4194304-abcdef")

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("light_tts.front")
_front: Front | None = None  # this process's front; there can be only one server per process
_configured = 0  # pid for which gunicorn_options was called


class ServerStartFailed(Exception):
    """The server cannot start; the message is for the operator."""


def _this_front() -> Front:
    """Return the front of this process, created by `start`."""
    assert _front is not None
    return _front


def start(parsed: Parsed) -> FastAPI:
    """Start everything except the HTTP workers and return the app they serve. On failure, print the reason
    and exit with code 1."""
    global _front
    try:
        with _interruptible():
            load_styles(parsed.settings.model_dir)  # raises if a file is missing, before anything is started
            _check_files(parsed.settings)
            _front = Front(parsed.settings, parsed.notes + _check_spk_dir(parsed.settings.spk_dir))
            from light_tts.server.api_http import create_app  # takes a second, while the stages load

            app = create_app(parsed.settings, _front.run_dir)
            _front.wait_ready()
            return app
    except (ServerStartFailed, StyleError) as error:
        if _front is not None:
            _front.stop()  # before printing, so that the reason is the last line
        elif parsed.settings.log_dir:
            line = f"the server cannot start: {error}"
            logs.append(parsed.settings.log_dir, "front", "ERROR", line, parsed.settings.log_format)
        print(f"light-tts: error: {error}", file=sys.stderr)
        sys.exit(1)


class Front:
    """The front process's handle on the supervisor."""

    def __init__(self, config: Settings, notes: list[str]) -> None:
        """Start the supervisor, which starts the stages. Raises ServerStartFailed."""
        self.config = config
        self._pid = os.getpid()
        self._draining = False
        self._open_files = open_files.raise_limit()
        self._ignore_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # started with nohup
        try:
            self._listener, running = takeover.listening_socket(config)
        except takeover.ListenError as error:
            raise ServerStartFailed(str(error)) from error
        swept = janitor.sweep(config.zmq_mode)
        self._notes = notes + ([f"removed files of dead servers: {', '.join(swept)}"] if swept else [])
        try:
            self.run_dir = RunDir.create(config.zmq_mode, config.port)
        except OSError as error:
            raise ServerStartFailed(f"--zmq_mode {config.zmq_mode}: {error}") from error
        atexit.register(self.stop)
        if len(str(self.run_dir.root)) + LONGEST_NAME > LONGEST_SOCKET_PATH:
            raise ServerStartFailed(f"--zmq_mode {config.zmq_mode}: the path is too long for a socket")
        self.run_dir.register_process()
        settings_file.save(config, str(self.run_dir.settings))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.run_dir.metrics)
        logs.setup("front", config.log_level, self._log_socket, config.log_format)
        ours, theirs = socket.socketpair()
        self._control = Control(ours)
        command = [
            sys.executable,
            "-m",
            "light_tts.server.supervision.supervisor",
            "--run_dir",
            str(self.run_dir.root),
        ]
        given = {"control": theirs, "listener": self._listener, "running": running}
        descriptors = {name: end.fileno() for name, end in given.items() if end is not None}
        command += ["--front", str(self._pid)]
        command += [word for name, number in descriptors.items() for word in (f"--{name}", str(number))]
        self._supervisor = subprocess.Popen(
            command, pass_fds=descriptors.values(), start_new_session=True, stdin=subprocess.DEVNULL
        )
        theirs.close()
        if running is not None:
            running.close()
        self._pidfd = os.pidfd_open(self._supervisor.pid)

    @property
    def _log_socket(self) -> Path | None:
        return self.run_dir.log if self.config.log_dir else None

    def wait_ready(self) -> None:
        """Wait until every stage is up. Raises ServerStartFailed with the reason."""
        while not self._control.closed:
            for event in self._control.receive(timeout=None):
                if event["event"] in ("ready", "failed"):
                    self._log_notes()
                if event["event"] == "ready":
                    return
                if event["event"] == "failed":
                    raise ServerStartFailed(event["reason"])
        raise ServerStartFailed("the supervisor exited; see its message above")

    def _log_notes(self) -> None:
        """Log what the operator should know about this start; the log file is available by now."""
        for note in self._notes:
            log.warning("%s", note)

    def stop(self) -> None:
        """Have the supervisor stop everything, and wait for it. Called at exit; may be called twice."""
        if os.getpid() != self._pid:  # in an HTTP worker, which inherits the exit handler
            return
        if hasattr(self, "_pidfd"):
            self._control.send("stop")
            if not process.wait_ended(self._pidfd, STOP_SECONDS):
                self._supervisor.kill()
                process.wait_ended(self._pidfd, 1.0)
            process.kill_all(self.run_dir.processes())
        mps.stop(self.run_dir)
        self.run_dir.remove()

    # -- gunicorn hooks (see gunicorn_options)

    def on_starting(self, arbiter: Arbiter) -> None:
        """gunicorn is about to listen: give it this server's socket."""
        try:
            self._listener.listen(arbiter.cfg.backlog)
        except OSError as error:  # another server started listening after this one was started
            print(
                f"light-tts: error: --host {self.config.host} --port {self.config.port}: {error}",
                file=sys.stderr,
            )
            sys.exit(1)
        arbiter.cfg.set("bind", f"fd://{self._listener.detach()}")

    def when_ready(self, arbiter: Arbiter) -> None:
        """gunicorn listens now: replace the signal handlers that its main loop calls."""
        arbiter.handle_term = lambda: self._drain("SIGTERM")
        arbiter.handle_int = lambda: self._interrupt(arbiter)
        arbiter.handle_quit = lambda: self._quit(arbiter)
        arbiter.handle_hup = lambda: None if self._ignore_hangup else self._drain("SIGHUP")
        arbiter.handle_usr2 = lambda: log.warning(
            "SIGUSR2 is ignored: start a second server with --replace instead"
        )
        reap, kill_workers = arbiter.handle_chld, arbiter.kill_workers
        arbiter.handle_chld = arbiter.handle_cld = lambda: self._child_ended(arbiter, reap)
        arbiter.kill_workers = lambda sig: kill_workers(STOP_WORKER if sig == signal.SIGTERM else sig)
        before, now = self._open_files
        connections = open_files.most_connections(self.config.max_connections)
        log.info(
            "open files: at most %d%s; connections of an HTTP worker: at most %d%s",
            now,
            f" (raised from {before})" if now > before else "",
            connections,
            " (fewer than --max_connections)" if connections < self.config.max_connections else "",
        )
        log.info("serving on %s:%d", self.config.host, self.config.port)
        if self.config.ssl_certfile:
            log.info("connections are encrypted (TLS)")
        spare_present_objects()  # also those of the workers, which are forked next

    def post_fork(self, _arbiter: Arbiter, worker: Any) -> None:
        """Runs first in a new HTTP worker."""
        process.die_with_parent(self._pid)
        self.run_dir.register_process()
        logs.setup("http", self.config.log_level, self._log_socket, self.config.log_format)

    def _interrupt(self, arbiter: Arbiter) -> None:
        if self._draining:
            self._end_at_once(arbiter, "second Ctrl-C")
        self._drain("Ctrl-C (press again to stop at once)")

    def _drain(self, why: str) -> None:
        if not self._draining:
            log.info("%s: accepted requests finish, new ones get 503", why)
            self._draining = True
            self._control.send("drain")

    def _quit(self, arbiter: Arbiter) -> None:
        """Handle SIGQUIT, sent by the supervisor, which has already logged the reason, or by the operator."""
        events = self._control.receive()
        for event in events:
            if event["event"] == "replaced":
                arbiter.spawn_workers = lambda: None  # a new worker would accept connections again
                arbiter.kill_workers(LEAVE_TO_OTHERS)
            if event["event"] == "exit":
                if event["code"]:
                    raise HaltServer(event["reason"], event["code"])
                raise StopIteration
        if not events:
            self._end_at_once(arbiter, "SIGQUIT")

    def _end_at_once(self, arbiter: Arbiter, why: str) -> None:
        log.warning("%s: stopping at once", why)
        arbiter.kill_workers(signal.SIGKILL)
        raise HaltServer(why, 1)

    def _child_ended(self, arbiter: Arbiter, reap: Any) -> None:
        if process.wait_ended(self._pidfd, 0):
            log.critical("the supervisor has died: stopping the server")
            arbiter.kill_workers(signal.SIGKILL)
            raise HaltServer("the supervisor has died", 1)
        reap()


class GunicornLog(glogging.Logger):
    """Sends gunicorn's log lines to the server's log."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


def gunicorn_options(config: Settings) -> dict[str, Any]:
    """Return gunicorn's settings for this server; its hooks look up the front that `start` has created by
    then."""
    global _configured
    _configured = os.getpid()
    host = f"[{config.host}]" if ":" in config.host else config.host
    return {
        "bind": f"{host}:{config.port}",  # for display only; on_starting provides the socket
        "workers": config.httpserver_workers,
        "worker_class": "light_tts.server.httpserver.worker.HttpWorker",
        "timeout": TIMEOUT,
        "keepalive": config.idle_timeout,
        "graceful_timeout": int(STOP_SECONDS),
        "preload_app": True,
        "certfile": config.ssl_certfile or None,
        "keyfile": config.ssl_keyfile or None,
        "logger_class": GunicornLog,
        "loglevel": "warning" if config.log_level == "info" else config.log_level,
        "control_socket_disable": True,
        "on_starting": lambda arbiter: _this_front().on_starting(arbiter),
        "when_ready": lambda arbiter: _this_front().when_ready(arbiter),
        "post_fork": lambda arbiter, worker: _this_front().post_fork(arbiter, worker),
    }


def preloading() -> bool:
    """Return whether this process is a gunicorn master that was configured with `gunicorn_options` and has
    not forked its workers yet."""
    return _configured == os.getpid()


def _check_files(config: Settings) -> None:
    """Check the flags that name files for the HTTP workers. Raises ServerStartFailed."""
    try:
        read_aliases(config.voice_aliases)
    except ValueError as error:
        raise ServerStartFailed(f"--voice_aliases {error}") from error
    try:
        read_keys(config)
        if config.otlp_endpoint:
            from light_tts.server.httpserver.tracing import check_tracing  # with the HTTP framework

            check_tracing(config)
    except SettingsError as error:
        raise ServerStartFailed(str(error)) from error
    if config.ssl_certfile:
        try:
            ssl.create_default_context().load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
        except OSError as error:
            raise ServerStartFailed(
                f"--ssl_certfile {config.ssl_certfile} --ssl_keyfile {config.ssl_keyfile}: {error}"
            ) from error


def _check_spk_dir(directory: str) -> list[str]:
    """Create the directory of named voices if it is missing, and return notes about it. Raises
    ServerStartFailed."""
    try:
        os.makedirs(directory, exist_ok=True)
        os.listdir(directory)
    except OSError as error:
        raise ServerStartFailed(f"--spk_dir {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        return [f"--spk_dir {directory} cannot be written: /add_spk will answer 507"]
    return []


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Context manager that turns terminating signals into SystemExit, so that cleanup runs."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
