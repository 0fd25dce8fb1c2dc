"""The supervisor: starts the stages and watches all processes. One asyncio loop, no torch.

python -m light_tts.server.supervision.supervisor --run_dir ROOT --front PID --control FD --listener FD
    [--running FD]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from light_tts.common import log as logs
from light_tts.common import process
from light_tts.server.core import messages, settings
from light_tts.server.core.channel import AsyncInbox, Outbox
from light_tts.server.core.counters import ActiveRequests
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.core.styles import load_styles
from light_tts.server.supervision import health, mps
from light_tts.server.supervision.control import Control
from light_tts.server.supervision.fleet import GPU_STAGES, Fleet, FleetStartFailed
from light_tts.server.supervision.takeover import Takeover
from light_tts.server.supervision.workers import HttpWorkers

DRAIN_NOTICE = 0.3  # seconds within which every HTTP worker learns that it must refuse new requests
FRONT_STOP = 15.0  # time for the front process to stop after it was told to

log = logging.getLogger("light_tts.supervisor")


class Supervisor:
    def __init__(
        self,
        config: Settings,
        run_dir: RunDir,
        front: int,
        control: Control,
        listener: socket.socket,
        running: socket.socket | None,
    ) -> None:
        """`listener`, `running`: see takeover.Takeover."""
        self.config = config
        self.run_dir = run_dir
        self.front = front
        self.front_pidfd = process.open_pidfd(front)  # None: it has ended already
        self.control = control
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()  # the front process asked for it, or has ended
        self.draining = False
        self.writer: logs.LogWriter | None = None
        self.inbox = AsyncInbox(run_dir.supervisor)
        self.outbox = Outbox()
        self.active = ActiveRequests(run_dir.shm)
        self.workers = HttpWorkers(run_dir, self.active, self._worker_gone)
        self.takeover = Takeover(run_dir.takeover, listener, running, self._replaced)
        self.fleet = Fleet(
            run_dir,
            {
                "encode": config.encode_process_num,
                "llm": len(load_styles(config.model_dir)),
                "decode": config.decode_process_num,
            },
            self.outbox,
            self._tell_all,
            self._log_line,
            {"cuda": config.hang_timeout_gpu, "cpu": config.hang_timeout_cpu},
        )
        self.janitor: subprocess.Popen[bytes] | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        code = 0
        try:
            self._watch_front()
            self._start_log()
            self._start_janitor()
            self._spawn(self._read_inbox())
            await self._start_stages()
            self.control.send("ready")
            if self.config.health_monitor:
                self._spawn(health.monitor(self.config, self.fleet.restart))
            await self.stop.wait()
        except (FleetStartFailed, mps.MpsError) as error:
            log.error("the server cannot start: %s", error)
            self.control.send("failed", reason=str(error))
            code = 1
            await self._front_has_heard()
        finally:
            self._clean_up()
        return code

    # -- startup

    def _start_log(self) -> None:
        if self.config.log_dir:
            try:
                self.writer = logs.LogWriter(self.run_dir.log, self.config.log_dir)
            except OSError as error:
                raise FleetStartFailed(f"--log_dir {self.config.log_dir}: {error}") from error
            self.loop.add_reader(self.writer, self.writer.take)
        logs.setup("supervisor", self.config.log_level, self.writer, self.config.log_format)

    def _watch_front(self) -> None:
        self.loop.add_reader(self.control, self._read_control)
        if self.front_pidfd is None:
            self.stop.set()
        else:
            self.loop.add_reader(self.front_pidfd, self._front_ended, self.front_pidfd)

    def _start_janitor(self) -> None:
        command = [
            sys.executable,
            "-m",
            "light_tts.server.supervision.janitor",
            "--run_dir",
            str(self.run_dir.root),
        ]
        command += ["--supervisor", str(os.getpid()), "--front", str(self.front)]
        self.janitor = started = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        self.run_dir.register_process(started.pid)
        pidfd = os.pidfd_open(started.pid)
        self.loop.add_reader(pidfd, self._janitor_ended, pidfd, started)

    async def _start_stages(self) -> None:
        started = time.monotonic()
        # Starting an MPS daemon takes seconds, in which the stages can import their packages.
        environment = await asyncio.to_thread(mps.expected_environment, self.config, self.run_dir)
        if environment is not None and not self.stop.is_set():
            self.fleet.launch(environment)
        sharing = await asyncio.to_thread(mps.prepare, self.config, self.run_dir)
        if self.stop.is_set():
            return
        if environment is None:
            self.fleet.launch(sharing.environment)
        self._spawn(self.fleet.watch_pulses())
        starting = asyncio.ensure_future(self.fleet.start())
        stopping = asyncio.ensure_future(self.stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            return
        await starting
        gpu_pids = self.fleet.pids(*GPU_STAGES)
        await asyncio.to_thread(mps.check_attached, self.config, sharing, gpu_pids)
        log.info("all stages are up (%.1f s)", time.monotonic() - started)

    # -- events

    async def _read_inbox(self) -> None:
        while True:
            try:
                message = await self.inbox.recv()
            except ValueError as error:
                log.error("message ignored: %s", error)
                continue
            match message:
                case messages.StageReady():
                    self.fleet.on_ready(message)
                case messages.StageStartFailed():
                    self.fleet.on_start_failed(message)
                case messages.WorkerHello(address=address):
                    slot = self.workers.on_hello(message)
                    if slot is not None:
                        topology = messages.Topology(
                            stages=self.fleet.topology(), worker_slot=slot, draining=self.draining
                        )
                        self.outbox.send(address, topology)
                    if len(self.workers) == self.config.httpserver_workers and not self.draining:
                        await self.takeover.serving()

    def _read_control(self) -> None:
        for event in self.control.receive():
            if event["event"] == "stop":
                self.stop.set()
            elif event["event"] == "drain":
                self._begin_drain()
        if self.control.closed:
            self.loop.remove_reader(self.control)

    def _front_ended(self, pidfd: int) -> None:
        self.loop.remove_reader(pidfd)
        if not self.stop.is_set():
            log.error("the HTTP front (pid %d) is gone: stopping the server", self.front)
        self.stop.set()

    def _janitor_ended(self, pidfd: int, janitor: subprocess.Popen[bytes]) -> None:
        self.loop.remove_reader(pidfd)
        os.close(pidfd)
        janitor.wait()
        self.run_dir.forget_process(janitor.pid)
        if not self.stop.is_set():
            log.warning("the janitor exited; starting another")
            self.loop.call_later(0.5, self._start_janitor)

    def _worker_gone(self, address: str) -> None:
        if self.stop.is_set():
            return
        self.outbox.forget(address)
        for stage in self.fleet.addresses():
            self.outbox.send(stage, messages.WorkerGone(address=address))

    # -- background tasks

    def _replaced(self) -> None:
        """Another server serves in place of this one: accept no connections, but serve the existing ones."""
        log.info("another server has taken over the port: this one finishes its requests and exits")
        self.control.send("replaced")
        self._signal_front(signal.SIGQUIT)  # to read it
        # After this time every connected client has sent a request or has been disconnected as idle.
        seconds = max(self.config.header_timeout, self.config.idle_timeout) + 1.0
        self.loop.call_later(seconds, self._begin_drain)

    def _begin_drain(self) -> None:
        if not self.draining:
            self.draining = True
            self.takeover.close()
            self._spawn(self._drain())

    async def _drain(self) -> None:
        log.info("draining: %d active requests", self.active.total())
        for address in self.workers.addresses():
            self.outbox.send(address, messages.Drain())
        deadline = time.monotonic() + self.config.drain_timeout
        await asyncio.sleep(min(DRAIN_NOTICE, self.config.drain_timeout))
        while self.active.total() > 0 and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        left = self.active.total()
        if left > 0:
            log.warning("--drain_timeout exceeded; %d requests are cut off", left)
        else:
            log.info("drained")
        self._end_front(0, "")

    def _end_front(self, code: int, reason: str) -> None:
        """Have the front process stop the HTTP workers and then us; kill it if it does not."""
        self.control.send("exit", code=code, reason=reason)
        self._signal_front(signal.SIGQUIT)  # to read it
        self.loop.call_later(FRONT_STOP, self._kill_front)

    def _kill_front(self) -> None:
        log.error("the HTTP front does not stop: killing it")
        self._signal_front(signal.SIGKILL)

    def _signal_front(self, number: signal.Signals) -> None:
        if self.front_pidfd is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.front_pidfd, number)

    # -- shutdown

    async def _front_has_heard(self) -> None:
        """Stop the stages and wait for the front process to say stop, since it may still use the run
        directory."""
        self.fleet.stop()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.stop.wait(), FRONT_STOP)

    def _clean_up(self) -> None:
        """Remove all remaining processes (except the front, which waits for us), sockets and segments."""
        self.stop.set()
        for task in self.tasks:
            task.cancel()
        self.fleet.stop()
        process.kill_all(pid for pid in self.run_dir.processes() if pid != self.front)
        if self.janitor is not None:
            self.janitor.kill()  # even if its registration was removed with the run directory
            self.janitor.wait()
        mps.stop(self.run_dir)
        log.info("stopped")
        if self.writer is not None:
            self.writer.close()
        self.inbox.close()
        self.outbox.close()
        self.run_dir.remove()

    # -- helpers

    def _tell_all(self, message: messages.Message) -> None:
        for address in self.fleet.addresses() + self.workers.addresses():
            self.outbox.send(address, message)

    def _log_line(self, line: str) -> None:
        if self.writer is not None:
            self.writer.write(line)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.critical("the supervisor failed", exc_info=task.exception())
            self._end_front(1, f"error in the supervisor: {task.exception()}")


async def _serve(args: argparse.Namespace) -> int:
    config = settings.load(str(args.run_dir / "settings.json"))
    run_dir = RunDir.open(args.run_dir, config.zmq_mode)
    run_dir.register_process()
    control = Control(socket.socket(fileno=args.control))
    listener = socket.socket(fileno=args.listener)
    running = None if args.running is None else socket.socket(fileno=args.running)
    return await Supervisor(config, run_dir, args.front, control, listener, running).run()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--front", type=int, required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--listener", type=int, required=True)
    parser.add_argument("--running", type=int)
    args = parser.parse_args()
    # The front process drains us; a signal to the whole process group or cgroup must not kill us before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    code = asyncio.run(_serve(args))
    sys.stdout.flush()
    os._exit(code)  # a health check may still be blocking in its thread


if __name__ == "__main__":
    main()
