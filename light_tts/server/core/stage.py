"""The environment of a stage process: its settings, its queues, and how it reports that it is ready."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from light_tts.server.core import messages
from light_tts.server.core.channel import Inbox, Outbox, Peers
from light_tts.server.core.heartbeat import Heartbeat
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.core.startup_times import StartupTimes

AWAKE_SECONDS = 0.005  # without sleep after `Expect`


class Stage(Protocol):
    """The part of a stage's main loop that runs between two receives."""

    def patience(self) -> float:
        """Return the seconds to wait for messages before the next step."""

    def receive(self, message: messages.Message) -> None: ...

    def step(self) -> None:
        """Process the messages that have arrived, work for a moment and send results."""


@dataclass
class StageContext:
    """Passed to `run(ctx)` of `light_tts.server.tts_<stage>.manager`.

    `peers` already knows the topology; later control messages must be passed to `peers.apply`. `run` must
    call `heartbeat.tick` in each iteration of its loop, at least every `ROUND_SECONDS` (core/heartbeat.py),
    and announce before each step how long it may take; otherwise the supervisor treats it as hung. `run`
    calls `ready` once its models are loaded, then handles messages until `Shutdown` arrives. An exception
    raised before `ready` becomes the reason why the server did not start; after it, the reason for a
    restart. `startup`: `run` ends its phases, and `ready` logs them. `loaded`: called when all is loaded.
    """

    settings: Settings
    run_dir: RunDir
    stage: str
    index: int
    incarnation: int
    inbox: Inbox
    outbox: Outbox
    peers: Peers
    log: logging.Logger
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    startup: StartupTimes = field(default_factory=StartupTimes)
    loaded: Callable[[], None] = lambda: None
    is_ready: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.index}"

    def ready(self, info: dict[str, Any]) -> None:
        """Tell the supervisor that this stage accepts messages. `info` is passed on to the HTTP workers; its
        `device` entry says where the stage computes."""
        self.loaded()
        self.heartbeat.tick()
        self.is_ready = True
        self.log.info("%s is ready: %s", self.name, self.startup)
        self.outbox.send(
            self.run_dir.supervisor,
            messages.StageReady(stage=self.stage, index=self.index, incarnation=self.incarnation, info=info),
        )

    def serve(self, stage: Stage) -> None:
        """Receive and process messages until `Shutdown` arrives."""
        awake_until = 0.0
        while True:
            self.heartbeat.tick()
            for message in self.inbox.wait(stage.patience(), awake_until - time.monotonic()):
                if isinstance(message, messages.Shutdown):
                    return
                if isinstance(message, messages.Expect):
                    awake_until = time.monotonic() + AWAKE_SECONDS
                else:
                    stage.receive(message)
            stage.step()

    def fail(self, job: str, reply_to: str, code: int, reason: str, retry: bool = False) -> None:
        """Tell the HTTP worker at `reply_to` that its job has failed. `code`: HTTP status; `retry`: another
        attempt may succeed."""
        failed = messages.Failed(job=job, stage=self.stage, code=code, message=reason, retry=retry)
        self.outbox.send(reply_to, failed)
