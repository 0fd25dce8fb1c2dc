"""Stages that hang: stopped, or with a main loop that is stuck. They are killed and replaced; every client
still gets all its audio."""

import asyncio
import ctypes
import os
import signal
import threading
import time

import pytest
from support.server_process import FEW_STEPS, start_server
from support.streams import CLIENTS, assert_same_audio, run_clients, stage_pid
from support.waiting import eventually

from light_tts.server.core.heartbeat import INTERVAL, DurationBound, Heartbeat, HeartbeatReader

HANG_TIMEOUT = 4.0
PTRACE_SEIZE, PTRACE_INTERRUPT, WAIT_ALL = 0x4206, 0x4207, 0x40000000


@pytest.fixture(scope="module")
def server():
    with start_server(decode_process_num=2, hang_timeout_cpu=HANG_TIMEOUT, **FEW_STEPS) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(server):
    return run_clients(server)


def stop_process(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def stop_main_thread(pid: int) -> None:
    """Stop only this thread; the others, which show that the process is alive, continue."""
    stopped = threading.Event()

    def trace() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        ok = not libc.ptrace(PTRACE_SEIZE, pid, None, None) and not libc.ptrace(PTRACE_INTERRUPT, pid, 0, 0)
        os.waitpid(pid, WAIT_ALL)  # it has stopped
        stopped.ok = ok
        stopped.set()
        os.waitpid(pid, WAIT_ALL)  # it has been killed; its parent learns of it after us

    threading.Thread(target=trace, daemon=True).start()
    assert stopped.wait(10) and stopped.ok, "ptrace is not allowed here"


@pytest.mark.parametrize(
    ("stage", "index", "received", "stop"),
    [
        pytest.param("encode", 0, 0, stop_process, id="encode is stopped before any audio"),
        pytest.param("llm", 0, 1, stop_process, id="llm is stopped at the first audio"),
        pytest.param(
            *("decode", 0, 1, stop_process),
            id="decode 0 is stopped at the first audio",
            marks=pytest.mark.nightly,
        ),
        pytest.param("decode", 1, 90_000, stop_main_thread, id="decode 1's loop no longer comes round"),
    ],
)
def test_hung_stage_is_replaced_and_loses_no_sample(server, undisturbed, stage, index, received, stop):
    server.wait_until_ready()
    states = set()

    async def disturb(clients) -> None:
        while not any(len(client.received) >= received for client in clients):
            await asyncio.sleep(0.002)
        stop(stage_pid(server, stage, index))
        deadline = time.monotonic() + 60
        while not (states and states_of(server, stage, index) == "up"):
            assert time.monotonic() < deadline, f"nobody noticed; seen: {states}"
            states.add(await asyncio.to_thread(states_of, server, stage, index))
            states.discard("up")
            await asyncio.sleep(0.1)

    got = run_clients(server, disturb)
    assert "silent" in states
    assert_same_audio(got, undisturbed)
    assert len(got) == CLIENTS


def states_of(server, stage: str, index: int) -> str:
    answer = server.readiness()
    states = {(entry["stage"], entry["index"]): entry["state"] for entry in answer.json()["stages"]}
    assert (answer.status_code == 200) == all(state == "up" for state in states.values())
    return states[stage, index]


def test_idle_stopped_stage_is_replaced(server):
    server.wait_until_ready()
    pid = stage_pid(server, "encode")
    stop_process(pid)
    assert eventually(lambda: stage_pid(server, "encode") != pid, 60)
    server.wait_until_ready()


# ---------------------------------------------------------------- what a process says of itself


def silence_after(path, seconds: float, say) -> float:
    reader = HeartbeatReader.create(path)
    say(Heartbeat(path))
    time.sleep(seconds)
    return reader.silence()


def test_a_step_that_takes_longer_than_it_said_is_silence(tmp_path):
    def say(heartbeat: Heartbeat) -> None:
        heartbeat.tick(60)
        heartbeat.begin(["a/0"], 0.0)

    assert silence_after(tmp_path / "heartbeat", 2.0, say) >= 2.0 - INTERVAL


def test_a_long_step_that_was_announced_is_none(tmp_path):
    def say(heartbeat: Heartbeat) -> None:
        heartbeat.tick(60)
        heartbeat.begin(["a/0"], 60.0)

    assert silence_after(tmp_path / "heartbeat", 2.0, say) < 2.0


def test_the_jobs_in_work_can_be_read(tmp_path):
    heartbeat, reader = Heartbeat(tmp_path / "heartbeat"), HeartbeatReader(tmp_path / "heartbeat")
    assert reader.in_work() == []
    first, second = heartbeat.begin(["a/0", "b/3"], 1.0), heartbeat.begin(["b/3", "c/0"], 1.0)
    assert reader.in_work() == ["a/0", "b/3", "c/0"]
    heartbeat.end(first)
    assert reader.in_work() == ["b/3", "c/0"]
    heartbeat.end(second)
    assert reader.in_work() == []
    heartbeat.end(heartbeat.begin([f"{n:016x}/0" for n in range(10_000)], 1.0))


def test_the_bound_is_learned_and_forgets_one_slow_step():
    bound = DurationBound(first=1.0, base=0.0)
    assert bound.allowance(100) == DurationBound.SAFETY * 100
    bound.observe(100, 10.0)
    assert bound.allowance(100) == DurationBound.SAFETY * 10
    bound.observe(100, 1000.0)
    assert bound.allowance(100) == DurationBound.SAFETY * 1000
    for _ in range(100):
        bound.observe(100, 10.0)
    assert bound.allowance(100) == pytest.approx(DurationBound.SAFETY * 10)
