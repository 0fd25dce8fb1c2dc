"""Stages stay awake while a request for them is being read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from light_tts.server.core import messages
from light_tts.server.core.channel import Inbox, Outbox, Peers
from light_tts.server.core.messages import Drain, Expect, Message, Shutdown, StageInfo, Topology
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.core.stage import AWAKE_SECONDS, StageContext
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.surface import HttpArrival

PATIENCE = 30.0


@pytest.fixture
def run_dir(socket_path: Path) -> Iterator[RunDir]:
    run_dir = RunDir.create(f"ipc://{socket_path}/", 1)
    run_dir.register_process()
    yield run_dir
    run_dir.remove()


@pytest.fixture
def inboxes(run_dir: RunDir) -> Iterator[dict[str, Inbox]]:
    inboxes = {name: Inbox(run_dir.stage_address(name, 0, 0)) for name in ("encode", "llm", "decode")}
    yield inboxes
    for inbox in inboxes.values():
        inbox.close()


def test_an_inbox_does_not_sleep_while_it_is_to_be_awake(inboxes):
    inbox = inboxes["llm"]

    def work(awake: float) -> float:
        begun, worked = time.monotonic(), time.thread_time()
        assert inbox.wait(0.3, awake) == []
        assert time.monotonic() - begun > 0.29
        return time.thread_time() - worked

    assert work(0.0) < 0.02 < work(10.0)  # seconds; the latter is what other processes leave it


def test_messages_and_wakes_end_the_wait_of_an_inbox_that_is_awake(inboxes):
    inbox, outbox = inboxes["llm"], Outbox()
    for act in (lambda: outbox.send(inbox.address, Drain()), inbox.wake):
        threading.Timer(0.05, act).start()
        begun = time.monotonic()
        assert inbox.wait(PATIENCE, PATIENCE) in ([Drain()], [])
        assert time.monotonic() - begun < PATIENCE / 2
    outbox.close()


class Receiver:
    """A stage that only receives."""

    def __init__(self) -> None:
        self.got: list[Message] = []

    def patience(self) -> float:
        return PATIENCE

    def receive(self, message: Message) -> None:
        self.got.append(message)

    def step(self) -> None:
        pass


def test_a_stage_stays_awake_for_what_it_is_told_to_expect(run_dir, inboxes, monkeypatch):
    inbox, outbox, stage = inboxes["llm"], Outbox(), Receiver()
    waits: list[float] = []
    wait = Inbox.wait

    def watched(inbox: Inbox, timeout: float, awake: float) -> list[Message]:
        waits.append(awake)
        return wait(inbox, timeout, awake)

    monkeypatch.setattr(Inbox, "wait", watched)
    ctx = StageContext(
        settings=Settings(),
        run_dir=run_dir,
        stage="llm",
        index=0,
        incarnation=0,
        inbox=inbox,
        outbox=outbox,
        peers=Peers(outbox),
        log=logging.getLogger("light_tts.llm"),
    )
    thread = threading.Thread(target=ctx.serve, args=(stage,))
    thread.start()
    for message in (Drain(), Expect(), Shutdown()):
        seen = len(waits)
        outbox.send(inbox.address, message)
        deadline = time.monotonic() + PATIENCE
        while thread.is_alive() and len(waits) == seen and time.monotonic() < deadline:
            time.sleep(0.01)
    thread.join(PATIENCE)
    outbox.close()
    assert stage.got == [Drain()]
    assert [0 < awake <= AWAKE_SECONDS for awake in waits] == [False, False, True]


@pytest.mark.parametrize(
    ("device", "state", "cores", "told"),
    [
        ("cuda:0", "up", 16, ["encode", "llm"]),
        ("cuda:0", "starting", 16, ["encode"]),
        ("cuda:0", "up", 4, []),
        ("cpu", "up", 16, []),
    ],
)
def test_stages_are_told_to_expect_a_request_where_it_matters(
    run_dir, inboxes, monkeypatch, device, state, cores, told
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    manager = HttpServerManager(Settings(), run_dir, ())
    states = {"encode": "up", "llm": state, "decode": "up"}
    infos = {"encode": {"speakers": []}, "llm": {"device": device}, "decode": {"device": device}}
    stages = [
        StageInfo(name, 0, 0, inbox.address, states[name], info=infos[name])
        for name, inbox in inboxes.items()
    ]
    manager.peers.apply(Topology(stages=stages))
    app = SimpleNamespace(state=SimpleNamespace(manager=manager))
    HttpArrival(SimpleNamespace(app=app, state=SimpleNamespace()), "zero_shot").close("rejected")
    manager.peers.broadcast(messages.Drain())
    got = {name: inbox.wait(PATIENCE) for name, inbox in inboxes.items()}
    assert [name for name, messages in got.items() if Expect() in messages] == told
    manager.peers.outbox.close()
