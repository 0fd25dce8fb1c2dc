"""All stage processes: starts them, restarts dead ones, and maintains the topology."""

from __future__ import annotations

import asyncio
import collections
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prometheus_client import multiprocess

from light_tts.server.core import messages, metrics
from light_tts.server.core.channel import Outbox
from light_tts.server.core.heartbeat import HeartbeatReader
from light_tts.server.core.messages import StageInfo
from light_tts.server.core.rundir import RunDir
from light_tts.server.supervision import threads
from light_tts.server.supervision.stage_process import StageProcess

DEATHS_BEFORE_GIVING_UP = 3
DEATH_WINDOW = 60.0  # seconds
SHUTDOWN_SECONDS = 1.0
LOADING_SILENCE = 120.0  # seconds; importing a large library may block all threads of a process
GPU_STAGES = ("llm", "decode")
MISSED_BEATS = 0.25  # fraction of the hang timeout after which a stage is avoided

log = logging.getLogger("light_tts.supervisor")


class FleetStartFailed(Exception):
    """A stage cannot start; the message is for the operator."""


@dataclass
class _StageRun:
    """An incarnation that has been started."""

    process: StageProcess
    heartbeat: HeartbeatReader


@dataclass
class _Stage:
    """One stage process. `run`: None before the start and after it has been given up. `deaths`: times of
    death of incarnations that did no work."""

    info: StageInfo
    run: _StageRun | None = None
    started: float = 0.0  # time.monotonic() at the start of this incarnation
    deaths: collections.deque[float] = field(
        default_factory=lambda: collections.deque(maxlen=DEATHS_BEFORE_GIVING_UP)
    )


class Fleet:
    """Starts and watches all stage processes. `sizes`: number of processes per stage. `patience`: seconds
    without progress after which a process is killed, by device type. `tell_all`: sends a message to every
    stage and HTTP worker."""

    def __init__(
        self,
        run_dir: RunDir,
        sizes: dict[str, int],
        outbox: Outbox,
        tell_all: Callable[[messages.Message], None],
        log_line: Callable[[str], None],
        patience: Mapping[str, float],
    ) -> None:
        self._run_dir = run_dir
        self._patience = patience
        self._outbox = outbox
        self._tell_all = tell_all
        self._log_line = log_line
        self._stages = {
            (stage, index): _Stage(self._fresh_info(stage, index, 0))
            for stage, count in sizes.items()
            for index in range(count)
        }
        self._environment = {
            **os.environ,
            **threads.environment(len(self._stages), os.environ),
            "PYTHONUNBUFFERED": "1",
        }
        self._stopping = False
        self._gpu_usable = False
        self._all_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def topology(self) -> list[StageInfo]:
        return [stage.info for stage in self._stages.values()]

    def addresses(self) -> list[str]:
        return [stage.info.address for stage in self._stages.values() if stage.info.state != "failed"]

    def pids(self, *names: str) -> list[int]:
        """Return the pids of these stages' running processes."""
        stages = self._stages.values()
        return [s.run.process.pid for s in stages if s.info.stage in names and s.run is not None]

    def launch(self, environment: Mapping[str, str]) -> None:
        """Start the processes of all stages. Those that may use a GPU import their packages and wait for
        `start`. `environment`: their extra environment variables."""
        self._environment |= environment
        for stage in reversed(self._stages.values()):  # decode first, which takes longest to load
            self._spawn(stage)

    async def start(self) -> None:
        """Let the processes load their models, and wait until each is ready. Raises FleetStartFailed."""
        self._gpu_usable = True
        for stage in self._stages.values():
            if stage.info.stage in GPU_STAGES:
                self._send_topology(stage)
        while not self._all_up.done():
            await asyncio.wait({self._all_up}, timeout=10)
            loading = [name_of(s.info) for s in self._stages.values() if s.info.state == "starting"]
            if loading and not self._all_up.done():
                log.info("still loading: %s", ", ".join(loading))
        self._all_up.result()

    # -- messages from stages

    def on_ready(self, message: messages.StageReady) -> None:
        stage = self._current(message)
        if stage is None:
            return
        self._set(stage, state="up", info=message.info)
        log.info("%s is up (%.1f s)", name_of(stage.info), time.monotonic() - stage.started)
        self._tell_all(messages.StageUp(stage=stage.info))
        if all(other.info.state == "up" for other in self._stages.values()) and not self._all_up.done():
            self._all_up.set_result(None)

    def on_start_failed(self, message: messages.StageStartFailed) -> None:
        stage = self._current(message)
        if stage is not None and stage.run is not None:
            stage.run.process.failure = message.reason

    # -- hangs

    async def watch_pulses(self) -> None:
        """Run forever: kill processes that hang, and announce those without progress so that they are
        avoided."""
        while not self._stopping:
            for stage in self._stages.values():
                if stage.run is not None and stage.run.process.alive:
                    self._check_pulse(stage, stage.run)
            await asyncio.sleep(min(0.5, min(self._patience.values()) / 8))

    def _check_pulse(self, stage: _Stage, run: _StageRun) -> None:
        info, silence = stage.info, run.heartbeat.silence()
        loaded = info.state in ("up", "silent")
        device = str(info.info.get("device", "cpu")).partition(":")[0]
        patience = self._patience[device] if loaded else LOADING_SILENCE
        if silence > patience:
            jobs = ", ".join(run.heartbeat.in_work()) or "none"
            run.process.end(f"hung: no progress for {silence:.0f} s; active jobs: {jobs}")
        elif loaded and (silence > MISSED_BEATS * patience) != (info.state == "silent"):
            if info.state == "silent":
                self._set(stage, state="up", reason="")
                self._tell_all(messages.StageUp(stage=stage.info))
            else:
                log.warning("%s has made no progress for %.1f s", name_of(info), silence)
                self._set(stage, state="silent", reason="no sign of progress")
                self._tell_all(messages.StageSilent(stage=stage.info))

    def restart(self, name: str, why: str) -> None:
        """Kill a process, which starts the next one, or start one that has been given up."""
        place = next(stage for stage in self._stages.values() if name_of(stage.info) == name)
        if place.run is not None and place.run.process.alive:
            place.run.process.end(why)
        elif place.info.state == "failed":
            log.warning("restarting %s: %s", name_of(place.info), why)
            place.deaths.clear()
            self._start_next(place, [])

    # -- start and death

    def _spawn(self, stage: _Stage) -> None:
        info = stage.info
        command = [sys.executable, "-m", "light_tts.server.core.stage_main"]
        arguments = {
            "run_dir": self._run_dir.root,
            "stage": info.stage,
            "index": info.index,
            "incarnation": info.incarnation,
            "address": info.address,
            "supervisor": os.getpid(),
        }
        for name, value in arguments.items():
            command += [f"--{name}", str(value)]
        log.info("loading %s", name_of(info))
        stage.started = time.monotonic()
        heartbeat = HeartbeatReader.create(self._run_dir.heartbeat(info.stage, info.index, info.incarnation))
        started = StageProcess(
            command,
            self._environment,
            lambda line: self._log_line(f"{name_of(info)}: {line}"),
            lambda process: self._on_end(stage, process),
        )
        stage.run = _StageRun(started, heartbeat)
        self._run_dir.register_process(started.pid)
        if self._gpu_usable or info.stage not in GPU_STAGES:
            self._send_topology(stage)

    def _send_topology(self, stage: _Stage) -> None:
        """Tell a process about the others, which it waits for before it loads its models."""
        self._outbox.send(stage.info.address, messages.Topology(stages=self.topology()))

    def _on_end(self, stage: _Stage, process: StageProcess) -> None:
        self._run_dir.forget_process(process.pid)
        multiprocess.mark_process_dead(process.pid)
        if self._stopping or stage.run is None or stage.run.process is not process:
            return
        name, reason = name_of(stage.info), process.reason()
        if not self._all_up.done():
            self._all_up.set_exception(FleetStartFailed(f"{name} cannot start: {reason}"))
            return
        log.error("%s ended: %s", name, reason)
        in_work, worked = stage.run.heartbeat.in_work(), stage.run.heartbeat.worked
        stage.run.heartbeat.remove()
        stage.run = None
        self._outbox.forget(stage.info.address)
        useless = not in_work and not worked
        if useless and self._dies_often(stage):
            self._give_up(stage, reason)
        else:
            self._start_next(stage, in_work)

    @staticmethod
    def _dies_often(stage: _Stage) -> bool:
        """Return whether a stage keeps dying before it does any work. Deaths during work are attributed to
        the jobs, which are retried alone, and a stage that has worked once can work again."""
        stage.deaths.append(time.monotonic())
        often = len(stage.deaths) == DEATHS_BEFORE_GIVING_UP
        return often and stage.deaths[-1] - stage.deaths[0] < DEATH_WINDOW

    def _start_next(self, stage: _Stage, in_work: list[str]) -> None:
        """Start the next incarnation after one that died while processing these jobs."""
        old = stage.info
        metrics.stage_restarts_total.labels(old.stage).inc()
        stage.info = self._fresh_info(old.stage, old.index, old.incarnation + 1, state="down")
        self._tell_all(
            messages.StageDown(
                stage=old.stage,
                index=old.index,
                incarnation=old.incarnation,
                next=stage.info,
                in_work=in_work,
            )
        )
        self._spawn(stage)

    def _give_up(self, stage: _Stage, reason: str) -> None:
        text = f"{name_of(stage.info)} died {DEATHS_BEFORE_GIVING_UP} times in {DEATH_WINDOW:.0f} s: {reason}"
        log.critical("%s; giving up on it", text)
        self._set(stage, state="failed", reason=text)
        self._tell_all(messages.StageGivenUp(stage=stage.info.stage, index=stage.info.index, reason=text))

    def stop(self) -> None:
        """Ask all stages to exit, wait a moment, kill the rest. Blocks."""
        self._stopping = True
        processes = []
        for stage in self._stages.values():
            if stage.run is not None and stage.run.process.alive:
                processes.append(stage.run.process)
                self._outbox.send(stage.info.address, messages.Shutdown())
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()

    # -- helpers

    def _fresh_info(self, stage: str, index: int, incarnation: int, state: str = "starting") -> StageInfo:
        address = self._run_dir.stage_address(stage, index, incarnation)
        return StageInfo(stage=stage, index=index, incarnation=incarnation, address=address, state=state)

    def _current(self, message: messages.StageReady | messages.StageStartFailed) -> _Stage | None:
        stage = self._stages.get((message.stage, message.index))
        return stage if stage is not None and stage.info.incarnation == message.incarnation else None

    @staticmethod
    def _set(stage: _Stage, **changes: Any) -> None:
        stage.info = msgspec.structs.replace(stage.info, **changes)


def name_of(info: StageInfo) -> str:
    return f"{info.stage}-{info.index}"
