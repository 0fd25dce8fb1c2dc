"""CUDA MPS with a fake control program: which commands are run, and what is started, checked and stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import find_below
from support.server_process import launch, speak, start_server

from light_tts.common import gpu
from light_tts.server import api_cli
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.supervision import janitor, mps

# Its daemon is a process that sleeps; its MPS server is the same process; its clients are the GPU stages
# whose pipe directory it is. It records its calls.
CONTROL = """#!{python}
import json, os, pathlib, psutil, signal, subprocess, sys, time
pipes = pathlib.Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or os.environ["FAKE_MPS_DEFAULT"])
pid_file = pipes / "nvidia-cuda-mps-control.pid"
if sys.argv[1:] == ["serve"]:
    time.sleep(600)
command = sys.stdin.read().strip()
with open(os.environ["FAKE_MPS_CALLS"], "a") as calls:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    calls.write(json.dumps([" ".join(sys.argv[1:]) or command, str(pipes), visible]) + "\\n")
failure = os.environ.get("FAKE_MPS_FAILURE")
if sys.argv[1:] == ["-d"]:
    if failure == "start":
        sys.exit("no permission")
    daemon = subprocess.Popen([__file__, "serve"], start_new_session=True)
    pid_file.write_text(str(daemon.pid))
    sys.exit(0)
try:
    daemon = psutil.Process(int(pid_file.read_text()))
except (OSError, psutil.Error):
    sys.exit("Cannot find MPS control daemon process")
if command == "get_server_list":
    print(daemon.pid)
elif command == f"get_client_list {{daemon.pid}}":
    for process in psutil.process_iter():
        try:
            line, found = process.cmdline(), process.environ().get("CUDA_MPS_PIPE_DIRECTORY")
        except psutil.Error:
            continue
        stage = "light_tts.server.core.stage_main" in line and ("llm" in line or "decode" in line)
        if stage and found == str(pipes) and failure != "clients":
            print(process.pid)
elif command.startswith("quit") and failure != "quit":
    daemon.kill()
    pid_file.unlink()
"""
NVML = """
NVMLError = OSError
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetCount = lambda: 1
"""
# Where mps_probe runs, every function of the driver succeeds.
DRIVER = """
import ctypes, sys
if "light_tts.server.supervision.mps_probe" in sys.orig_argv:
    class Driver:
        def __getattr__(self, name):
            return lambda *arguments: 0
    ctypes.CDLL = lambda name, *rest: Driver()
"""


class Fake:
    """The control program in `path` and its recorded calls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.default_pipes = path / "nvidia-mps"
        self.default_pipes.mkdir()
        program = path / "nvidia-cuda-mps-control"
        program.write_text(CONTROL.format(python=sys.executable))
        program.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        """[command, pipe directory, CUDA_VISIBLE_DEVICES] of each call."""
        log = self.path / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def commands(self, pipes: Path | str) -> list[str]:
        return [command for command, asked, _ in self.calls if asked == str(pipes)]

    def daemons(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if str(self.path / "nvidia-cuda-mps-control") in line and line[-1] == "serve":
                found.append(process)
        return found


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    (tmp_path / "bin").mkdir()
    fake = Fake(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_MPS_CALLS", str(fake.path / "calls"))
    monkeypatch.setenv("FAKE_MPS_DEFAULT", str(fake.default_pipes))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "visible_gpus", lambda: 1)
    monkeypatch.setattr(mps, "_probe", lambda environment: None)
    yield fake
    for daemon in fake.daemons():
        daemon.kill()


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    run_dir = RunDir.create("tcp://", 1)
    yield run_dir
    run_dir.remove()


def settings(**changes: object) -> Settings:
    return Settings(model_dir="unused", **changes)


def start_default_daemon(fake: Fake) -> None:
    mps._control(["-d"], "", {})
    (fake.path / "calls").unlink()


def test_off_asks_nothing(fake: Fake, run_dir: RunDir):
    assert mps.prepare(settings(mps="off"), run_dir) == mps.Mps({})
    assert fake.calls == []


def test_without_a_gpu_auto_does_nothing_and_on_fails(fake, run_dir, monkeypatch):
    for config in ({"device": "cpu"}, {"device": "auto"}):
        if config["device"] == "auto":
            monkeypatch.setattr(gpu, "visible_gpus", lambda: 0)
        assert mps.prepare(settings(mps="auto", **config), run_dir) == mps.Mps({})
        with pytest.raises(mps.MpsError, match="--mps on: this server does not use a CUDA GPU"):
            mps.prepare(settings(mps="on", **config), run_dir)
    assert fake.calls == []


def test_a_running_daemon_is_used_and_left_running(fake: Fake, run_dir: RunDir):
    start_default_daemon(fake)
    assert mps.prepare(settings(), run_dir) == mps.Mps({}, "the running daemon")
    mps.stop(run_dir)
    assert [call[0] for call in fake.calls] == ["get_server_list"]
    assert len(fake.daemons()) == 1


def test_the_daemon_of_the_environment_is_used(fake: Fake, run_dir: RunDir, tmp_path: Path, monkeypatch):
    (tmp_path / "pipes").mkdir()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "pipes"))
    start_default_daemon(fake)
    assert mps.prepare(settings(), run_dir).daemon == "the running daemon"
    assert fake.commands(tmp_path / "pipes") == ["get_server_list"]


def test_a_daemon_of_its_own_is_started_and_ended(fake: Fake, run_dir: RunDir, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = mps.prepare(settings(), run_dir)
    pipes = run_dir.root / "mps"
    assert found.environment == {
        "CUDA_MPS_PIPE_DIRECTORY": str(pipes),
        "CUDA_MPS_LOG_DIRECTORY": str(run_dir.root / "mps-log"),
    }
    assert found.daemon == "a daemon of its own"
    assert pipes.stat().st_mode & 0o777 == 0o700
    assert ["-d", str(pipes), None] in fake.calls, "the daemon shows all GPUs"
    assert len(fake.daemons()) == 1
    mps.stop(run_dir)
    mps.stop(run_dir)
    assert fake.commands(pipes) == ["-d", "get_server_list", "get_server_list", "quit -t 1"]
    assert fake.daemons() == [] and not pipes.exists()


def test_a_daemon_that_does_not_quit_is_killed(fake: Fake, run_dir: RunDir, monkeypatch):
    mps.prepare(settings(), run_dir)
    monkeypatch.setenv("FAKE_MPS_FAILURE", "quit")
    mps.stop(run_dir)
    assert fake.daemons() == []


@pytest.mark.parametrize("failure", ["missing", "start", "probe", "path"])
def test_where_no_daemon_can_start_auto_goes_on_and_on_fails(fake, run_dir, monkeypatch, caplog, failure):
    reason = {
        "missing": "nvidia-cuda-mps-control is not on PATH",
        "start": "nvidia-cuda-mps-control: no permission",
        "probe": "cannot use the GPU: cuInit; control.log: what the daemon says",
        "path": "too long",
    }[failure]
    if failure == "missing":
        (fake.path / "nvidia-cuda-mps-control").unlink()
        monkeypatch.setenv("PATH", str(fake.path))  # a machine with a GPU has the real one elsewhere
    elif failure == "start":
        monkeypatch.setenv("FAKE_MPS_FAILURE", "start")
    elif failure == "probe":

        def probe(environment: dict[str, str]) -> None:
            (run_dir.root / "mps-log" / "control.log").write_text("first\nwhat the daemon says\n")
            raise mps.MpsError("a test process cannot use the GPU: cuInit")

        monkeypatch.setattr(mps, "_probe", probe)
    else:
        monkeypatch.setattr(mps, "LONGEST_PIPES", 10)
    with caplog.at_level(logging.WARNING):
        found = mps.prepare(settings(mps="auto"), run_dir)
    assert found == mps.Mps({})
    [record] = caplog.records
    assert reason in record.getMessage()
    with pytest.raises(mps.MpsError, match=f"--mps on: .*{reason}"):
        mps.prepare(settings(mps="on"), run_dir)
    assert fake.daemons() == []


@pytest.mark.parametrize("fault", ["owner", "probe"])
def test_a_running_daemon_that_does_not_serve_us_is_passed_over(fake, run_dir, monkeypatch, caplog, fault):
    start_default_daemon(fake)

    def refuse(environment: dict[str, str]) -> None:
        if not environment:
            raise mps.MpsError("a test process cannot use the GPU: it waits")

    if fault == "owner":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        monkeypatch.setattr(mps, "_probe", refuse)
    with caplog.at_level(logging.WARNING):
        assert mps.prepare(settings(), run_dir).daemon == "a daemon of its own"
    assert ("serves another user" if fault == "owner" else "it waits") in caplog.text
    mps.stop(run_dir)
    assert len(fake.daemons()) == 1


def test_stages_are_led_away_from_a_broken_daemon(fake: Fake, run_dir: RunDir, monkeypatch):
    start_default_daemon(fake)

    def refuse(environment: dict[str, str]) -> None:
        raise mps.MpsError("a test process cannot use the GPU: it waits")

    monkeypatch.setattr(mps, "_probe", refuse)
    found = mps.prepare(settings(), run_dir)
    assert found.daemon == ""
    assert found.environment["CUDA_MPS_PIPE_DIRECTORY"] == str(run_dir.root / "mps")
    assert not (run_dir.root / "mps").exists()


def test_a_control_program_that_hangs_is_given_up(fake: Fake, run_dir: RunDir, monkeypatch):
    (fake.path / "nvidia-cuda-mps-control").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(mps, "START_SECONDS", 0.2)
    monkeypatch.setattr(mps._control, "__defaults__", (0.1,))
    with pytest.raises(mps.MpsError, match=r"does not answer within 0\.2 s"):
        mps.prepare(settings(mps="on"), run_dir)


def test_attached_clients_are_counted(fake: Fake, run_dir: RunDir, monkeypatch, caplog):
    found = mps.prepare(settings(), run_dir)
    monkeypatch.setattr(
        mps, "_pids", lambda command, _: [7] if command == "get_server_list" else [11, 12, 99]
    )
    with caplog.at_level(logging.INFO):
        mps.check_attached(settings(mps="on"), found, [11, 12])
        mps.check_attached(settings(mps="auto"), found, [11, 12, 13])
        mps.check_attached(settings(mps="auto"), mps.Mps({}), [11])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "MPS: using a daemon of its own; 2 of 2 GPU processes are attached"),
        ("WARNING", "MPS: using a daemon of its own; 2 of 3 GPU processes are attached"),
    ]
    with pytest.raises(mps.MpsError, match="2 of 3 GPU processes are attached"):
        mps.check_attached(settings(mps="on"), found, [11, 12, 13])
    mps.stop(run_dir)


def test_a_daemon_that_stops_answering_is_said(fake: Fake, run_dir: RunDir, caplog):
    found = mps.prepare(settings(), run_dir)
    (run_dir.root / "mps" / "nvidia-cuda-mps-control.pid").unlink()
    mps.check_attached(settings(mps="auto"), found, [1])
    assert "does not answer" in caplog.text


def test_sweeping_a_dead_server_ends_its_daemon(fake: Fake, tmp_path: Path):
    run_dir = RunDir.create(f"ipc://{tmp_path}/", 1)
    mps.prepare(settings(), run_dir)
    (run_dir.pids / "999999999").write_text("0")
    assert run_dir.root.name in janitor.sweep(f"ipc://{tmp_path}/")
    assert fake.daemons() == [] and not run_dir.root.exists()


def test_flag_in_all_its_spellings(tmp_path: Path):
    def parsed(*flags: str) -> str:
        return api_cli.parse([*flags, "--model_dir", str(tmp_path)]).settings.mps

    assert parsed() == "auto"
    assert parsed("--mps", "on") == "on"
    config = tmp_path / "config.yaml"
    for text, value in (("on", "on"), ("off", "off"), ("auto", "auto")):
        config.write_text(f"mps: {text}\n")
        assert parsed("--config", str(config)) == value
    with pytest.raises(api_cli.SettingsError, match="one of auto, on, off"):
        parsed("--mps", "maybe")


# -- the real server over the pretended daemon


@pytest.fixture
def machine(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Child processes see a machine with one GPU (unknown to torch)."""
    (fake.path / "pynvml.py").write_text(NVML)
    (fake.path / "sitecustomize.py").write_text(DRIVER)
    monkeypatch.setenv("PYTHONPATH", str(fake.path), prepend=os.pathsep)
    return fake


def gone(fake: Fake, seconds: float = 8.0) -> bool:
    end = time.monotonic() + seconds
    while fake.daemons() and time.monotonic() < end:
        time.sleep(0.05)
    return not fake.daemons()


def test_server_starts_a_daemon_gives_it_to_the_stages_and_ends_it(machine: Fake):
    with start_server(mps="on") as server:
        assert "MPS: using a daemon of its own; 2 of 2 GPU processes are attached" in server.output
        with server.client() as client:
            assert speak(client, "Hello.", max_new_tokens=5).status_code == 200
    assert server.process.returncode == 0
    assert gone(machine) and server.leftovers() == []
    assert "quit -t 1" in [call[0] for call in machine.calls]


def test_killing_supervisor_or_server_ends_the_daemon(machine: Fake):
    with start_server(mps="auto") as server:
        [supervisor] = find_below(server.pid, "light_tts.server.supervision.supervisor")
        assert len(machine.daemons()) == 1
        os.kill(server.pid, signal.SIGKILL)
        os.kill(supervisor.pid, signal.SIGKILL)
        assert gone(machine)
        server.process.wait()


def test_on_without_attached_clients_ends_the_start_with_the_reason(machine: Fake, monkeypatch):
    monkeypatch.setenv("FAKE_MPS_FAILURE", "clients")
    with launch(wait=False, mps="on") as server:
        assert server.process.wait(120) == 1
        assert "--mps on: using a daemon of its own; 0 of 2 GPU processes are attached" in server.output
    assert gone(machine) and server.leftovers() == []
