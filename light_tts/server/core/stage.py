"""What a stage process is given: its settings, its queues, and how to say that it is ready."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

from light_tts.server.core import messages
from light_tts.server.core.channel import Inbox, Outbox, Peers
from light_tts.server.core.pulse import Pulse
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings


class Stage(Protocol):
    """Everything that a stage does between two messages."""

    def patience(self) -> float:
        """Seconds to wait for messages before the next step."""

    def receive(self, message: messages.Message) -> None: ...

    def step(self) -> None:
        """Work and hand out for a moment, after the messages that have come."""


@dataclass
class StageContext:
    """Handed to `run(ctx)` of `light_tts.server.tts_<stage>.manager`.

    `peers` knows the topology already; control messages that arrive later go through `peers.apply`.
    Between two rounds of its loop, at least every `pulse.ROUND_SECONDS`, `run` calls `pulse.tick`, and says
    of each step before it begins how long it may take; else the supervisor takes it for hung.
    `run` calls `ready` once its models are loaded, then handles messages until `Shutdown` arrives. What it
    raises before `ready` becomes the reason why the server did not start; later, why the stage is restarted.
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
    pulse: Pulse = field(default_factory=Pulse)
    is_ready: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.index}"

    def ready(self, info: dict[str, Any]) -> None:
        """Tell the supervisor that messages are being taken; `info` reaches the HTTP workers. In it `device`
        says where the stage computes."""
        self.pulse.tick()
        self.is_ready = True
        self.outbox.send(
            self.run_dir.supervisor,
            messages.StageReady(stage=self.stage, index=self.index, incarnation=self.incarnation, info=info),
        )

    def serve(self, stage: Stage) -> None:
        """Receive and work until `Shutdown` arrives."""
        while True:
            self.pulse.tick()
            for message in self.inbox.wait(stage.patience()):
                if isinstance(message, messages.Shutdown):
                    return
                stage.receive(message)
            stage.step()

    def fail(self, job: str, reply_to: str, code: int, reason: str, retry: bool = False) -> None:
        """Tell the HTTP worker at `reply_to` that its job has failed here. `code`: an HTTP status; `retry`:
        another attempt may succeed."""
        failed = messages.Failed(job=job, stage=self.stage, code=code, message=reason, retry=retry)
        self.outbox.send(reply_to, failed)
