"""Start, stop and sudden death of the whole server: nothing hangs, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from support import waiting
from support.processes import command_line
from support.server_process import CHECKPOINT, PROMPT_TEXT, PROMPT_WAV, Server, launch, speak, start_server

from light_tts.server.core import rundir
from light_tts.server.core.rundir import RunDir
from light_tts.server.supervision import janitor

LONG_TEXT = "The quick brown fox jumps over the lazy dog and runs away. " * 8


def processes(server: Server) -> list[psutil.Process]:
    """Every process of this server, told by the port in its command line."""
    found = []
    for process in psutil.process_iter():
        line = command_line(process)
        if any(f"light_tts-{server.port}-" in word for word in line) or str(server.port) in line:
            found.append(process)
    return found


def pid_of(server: Server, module: str, *words: str) -> int:
    """The process that runs `module`, with these words in its command line."""
    for process in processes(server):
        line = command_line(process)
        if module in line and all(word in line for word in words):
            return process.pid
    raise LookupError(f"no process runs {module} {words}")


def worker_pids(server: Server) -> set[int]:
    supervisor = pid_of(server, "light_tts.server.supervision.supervisor")
    return {child.pid for child in psutil.Process(server.pid).children()} - {supervisor}


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    """`waiting.eventually`; processes may end and the server may not answer in the meantime."""
    return waiting.eventually(condition, seconds, ignored=(LookupError, psutil.Error, httpx.HTTPError))


def nothing_left(server: Server, seconds: float = 3.0) -> bool:
    return eventually(lambda: not processes(server) and not server.leftovers(), seconds)


def stream_in_background(
    server: Server, least_tokens: int = 0
) -> tuple[threading.Thread, dict[str, object], threading.Event]:
    """Start a long streaming request whose parts have at least this many speech tokens; `speaking` is set
    with its first bytes."""
    result: dict[str, object] = {}
    speaking = threading.Event()

    def read() -> None:
        form = {
            "tts_text": LONG_TEXT,
            "prompt_text": PROMPT_TEXT,
            "stream": "true",
            "seed": "1",
            "min_new_tokens": str(least_tokens),
            "max_new_tokens": str(max(150, least_tokens)),
        }
        files = {"prompt_wav": ("prompt.wav", PROMPT_WAV.read_bytes())}
        try:
            with httpx.stream(
                "POST", f"{server.url}/inference_zero_shot", data=form, files=files, timeout=120
            ) as answer:
                result["status"] = answer.status_code
                size = 0
                for piece in answer.iter_bytes():
                    size += len(piece)
                    speaking.set()
                result["bytes"] = size
        except httpx.HTTPError as error:
            result["error"] = error
        finally:
            speaking.set()

    thread = threading.Thread(target=read)
    thread.start()
    return thread, result, speaking


# ---------------------------------------------------------------- while it runs


def test_a_killed_janitor_is_replaced(server):
    old = pid_of(server, "light_tts.server.supervision.janitor")
    os.kill(old, signal.SIGKILL)
    assert eventually(lambda: pid_of(server, "light_tts.server.supervision.janitor") != old)
    assert server.readiness().status_code == 200


def test_a_killed_http_worker_is_replaced_and_the_others_go_on(server):
    before = worker_pids(server)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    assert eventually(lambda: f"HTTP worker {victim} is gone" in server.output, 2)
    assert eventually(lambda: len(worker_pids(server) - {victim}) == len(before))
    with server.client() as client:
        assert eventually(lambda: server.readiness().status_code == 200)
        assert speak(client, "Hello again.").status_code == 200


def test_supervisor_and_http_workers_load_no_torch(server):
    light = [pid_of(server, "light_tts.server.supervision.supervisor"), server.pid, *worker_pids(server)]
    for pid in light:
        maps = {entry.path for entry in psutil.Process(pid).memory_maps()}
        assert not any("libtorch" in path for path in maps)


# ---------------------------------------------------------------- the end in good order


def test_sigterm_to_the_group_lets_the_accepted_request_finish_and_refuses_new_ones():
    with start_server(httpserver_workers=2) as server:
        thread, result, speaking = stream_in_background(server)
        assert speaking.wait(60)
        # Container runtimes, tmux and `timeout` signal the whole process group: front and HTTP workers.
        for pid in [*worker_pids(server), server.pid]:
            os.kill(pid, signal.SIGTERM)
        with server.client() as client:
            assert eventually(lambda: server.readiness().status_code == 503)
            assert speak(client, "Too late.").status_code == 503
        thread.join(90)
        assert result.get("status") == 200 and "error" not in result, result
        assert result["bytes"] > 48000
        assert server.process.wait(15) == 0
        assert nothing_left(server)


def test_ctrl_c_twice_ends_at_once():
    with start_server(httpserver_workers=2) as server:
        thread, _, speaking = stream_in_background(server)
        assert speaking.wait(60)
        # A terminal sends Ctrl-C to the whole process group: front and HTTP workers.
        group = [server.pid, *worker_pids(server)]
        for pid in group:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None, "the first Ctrl-C drains"
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        server.process.wait(10)
        assert time.monotonic() - began < 4
        thread.join(10)
        assert not thread.is_alive()
        assert nothing_left(server)


def test_drain_timeout_ends_what_takes_longer_also_over_tcp():
    with start_server(drain_timeout=1, zmq_mode="tcp://") as server:
        thread, result, speaking = stream_in_background(server, least_tokens=2000)
        assert speaking.wait(60)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        assert time.monotonic() - began < 8
        thread.join(10)
        assert "error" in result, "the client must see that its audio is incomplete"
        assert "1 requests are cut off" in server.output
        assert nothing_left(server)


# ---------------------------------------------------------------- sudden death


@pytest.mark.parametrize("victims", ["front", "supervisor", "front and supervisor"])
def test_a_killed_parent_leaves_nothing(victims):
    with start_server(httpserver_workers=2) as server:
        pids = {"front": server.pid, "supervisor": pid_of(server, "light_tts.server.supervision.supervisor")}
        for name in victims.split(" and "):
            os.kill(pids[name], signal.SIGKILL)
        assert server.process.wait(5) != 0
        assert nothing_left(server)


def test_a_killed_parent_leaves_nothing_also_where_its_directories_were_removed():
    with start_server() as server:
        tree = psutil.Process(server.pid).children(recursive=True)
        for path in (*server.directory.glob("ipc/*"), *Path("/dev/shm").glob(f"light_tts-{server.port}-*")):
            shutil.rmtree(path)
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait()
        assert eventually(lambda: not any(process.is_running() for process in tree), 10)


@pytest.fixture(scope="module")
def monitored() -> Iterator[Server]:
    """A server with a health monitor, and with flags that it cannot heed on a CPU."""
    monitor = {"health_monitor": True, "health_check_interval": 3, "health_cache_seconds": 0}
    vain = {"tokenizer_mode": "auto", "mode": "triton_flashdecoding", "device": "cpu"}
    with start_server(**monitor, **vain) as running:
        yield running


def test_what_a_flag_cannot_do_here_is_said_once_in_the_log_file_too(monitored):
    log = (monitored.directory / "logs" / "light-tts.log").read_text()
    for note in ("without effect: --tokenizer_mode", "--device cpu: ignoring --mode triton_flashdecoding"):
        assert monitored.output.count(note) == log.count(note) == 1


def test_a_stage_that_keeps_dying_ends_in_503_until_the_health_monitor_starts_it_again(monitored):
    killed: set[int] = set()

    def kill_next() -> bool:
        pid = pid_of(monitored, "light_tts.server.core.stage_main", "decode")
        if pid in killed:
            return False
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
        return True

    for _ in range(3):
        assert eventually(kill_next)
    assert eventually(lambda: "died 3 times" in monitored.readiness().text)
    with monitored.client() as client:
        assert speak(client, "Nobody can say this.").status_code == 503
    monitored.wait_until_ready()
    assert "3 health checks in a row failed" in monitored.output
    with monitored.client() as client:
        assert speak(client, "It is back.").status_code == 200


# ---------------------------------------------------------------- a start that fails


@contextlib.contextmanager
def failed_start(**flags: object) -> Iterator[Server]:
    """A server whose start must fail; yields it once it has exited."""
    with launch(wait=False, **flags) as server:
        assert server.process.wait(60) == 1, server.output
        assert nothing_left(server)
        yield server


def test_a_taken_port_is_found_before_any_stage_starts():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        began = time.monotonic()
        with failed_start(port=port) as server:
            assert time.monotonic() - began < 5
            assert f"--port {port}" in server.output.strip().splitlines()[-1] and "in use" in server.output
            assert "loading" not in server.output
            assert f"--port {port}" in (server.directory / "logs" / "light-tts.log").read_text()


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("llm.pt", marks=pytest.mark.nightly),
        pytest.param("flow.pt", marks=pytest.mark.nightly),
        "speech_tokenizer_v2.onnx",
    ],
)
def test_a_truncated_file_is_named_in_the_last_line_and_in_the_log_file(tmp_path, file):
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    os.truncate(model / file, 1000)
    with failed_start(model_dir=model) as server:
        last = server.output.strip().splitlines()[-1]
        assert last.startswith("light-tts: error:") and "cannot start" in server.output and file in last
        log = (server.directory / "logs" / "light-tts.log").read_text()
        assert "the server cannot start" in log and file in log


def test_a_missing_model_file_is_named(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    (model / "llm.pt").unlink()
    with failed_start(model_dir=model) as server:
        assert "llm.pt" in server.output and "Traceback" not in server.output


def test_a_stage_killed_while_loading_ends_the_start():
    with launch(wait=False) as server:
        assert eventually(lambda: bool(pid_of(server, "light_tts.server.core.stage_main", "llm")))
        os.kill(pid_of(server, "light_tts.server.core.stage_main", "llm"), signal.SIGKILL)
        assert server.process.wait(10) == 1
        assert "llm-0 cannot start: killed (out of memory?)" in server.output
        assert nothing_left(server)


def test_a_directory_of_voices_that_cannot_be_made_is_named():
    with failed_start(spk_dir="/proc/voices") as server:
        assert "--spk_dir /proc/voices" in server.output


def test_a_log_directory_that_cannot_be_made_is_named():
    with failed_start(log_dir="/proc/logs") as server:
        assert "--log_dir /proc/logs" in server.output


def test_sigterm_while_loading_ends_the_start():
    with launch(wait=False) as server:
        assert eventually(lambda: bool(pid_of(server, "light_tts.server.core.stage_main", "decode")))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 128 + signal.SIGTERM
        assert nothing_left(server)


# ---------------------------------------------------------------- what dead servers left


def test_a_start_removes_what_dead_servers_left_and_nothing_else(tmp_path):
    zmq_mode = f"ipc://{tmp_path}/"
    dead, alive, fresh = (RunDir.create(zmq_mode, port) for port in (1, 2, 3))
    try:
        ended = subprocess.Popen(["true"])
        (dead.pids / str(ended.pid)).write_text("1")
        ended.wait()
        (dead.pids / str(os.getpid())).write_text("another process had this pid")
        alive.register_process()
        assert dead.root.name in janitor.sweep(zmq_mode)
        assert not dead.root.exists() and not dead.shm.exists()
        assert alive.root.exists() and fresh.shm.exists()
        alive.forget_process(os.getpid())
    finally:
        for run_dir in (dead, alive, fresh):
            run_dir.remove()


def test_shared_memory_of_another_container_is_left_alone(tmp_path):
    run_dir = RunDir.create(f"ipc://{tmp_path}/", 1)
    try:
        link = run_dir.shm / rundir.PIDS_LINK
        link.unlink()
        link.symlink_to("pid:[1]")
        (run_dir.pids / "4194303").write_text("1")
        janitor.sweep(f"ipc://{tmp_path}/")
        assert run_dir.shm.exists()
    finally:
        run_dir.remove()
