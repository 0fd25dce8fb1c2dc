"""CUDA MPS (Multi-Process Service), which lets the stage processes compute on a GPU at the same time; without
it they take turns.

A client finds the control daemon through its pipe directory, CUDA_MPS_PIPE_DIRECTORY or /tmp/nvidia-mps, and
runs without MPS if there is no daemon. So the stages only need an environment variable. Commands and
variables are documented in NVIDIA's guide "Multi-Process Service" and in nvidia-cuda-mps-control(1).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from light_tts.common import gpu, process
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "mps", "mps-log"  # in the run directory
LONGEST_PIPES = 80  # bytes; the full paths of the sockets that MPS creates there are limited to 107
ANSWER_SECONDS = 3.0  # for a command of the control program
START_SECONDS = 10.0  # for the daemon to start, and again for its first answer
PROBE_SECONDS = 30.0  # the first client waits until the daemon has started an MPS server
QUIT_SECONDS = 1  # time for MPS servers to exit on their own

log = logging.getLogger("light_tts.mps")


class MpsError(Exception):
    """MPS cannot be used; the message says why."""


@dataclass(frozen=True)
class Mps:
    """`environment`: extra environment variables of the stages. `daemon`: description of the daemon they use,
    empty if none."""

    environment: dict[str, str]
    daemon: str = ""


def prepare(config: Settings, run_dir: RunDir) -> Mps:
    """Find a working daemon or start one, as --mps says. Blocks for seconds. With `on`, raises MpsError if
    that fails."""
    if config.mps == "off" or (config.mps == "auto" and not _has_gpu(config)):
        return Mps({})
    try:
        # No need to count processes: every LLM and the first decode process use GPU 0 on any machine.
        if not _has_gpu(config):
            raise MpsError("this server does not use a CUDA GPU")
        if shutil.which(CONTROL) is None:
            raise MpsError(f"{CONTROL} is not on PATH")
        if _running_daemon_works():
            return Mps({}, "the running daemon")
        return Mps(_start(run_dir), "a daemon of its own")
    except MpsError as error:
        if config.mps == "on":
            raise MpsError(f"--mps on: {error}") from error
        log.warning("MPS: not used, processes on one GPU take turns: %s", error)
        return Mps(_away_from_running_daemon(run_dir))


def expected_environment(config: Settings, run_dir: RunDir) -> dict[str, str] | None:
    """Return an environment for processes that are started before `prepare` has ended and use no GPU until
    then: if `prepare` starts a daemon, it is found, otherwise there is none and they run without MPS. None:
    that depends on a daemon that is running already."""
    if config.mps == "off" or not _has_gpu(config) or shutil.which(CONTROL) is None:
        return {}
    try:
        _servers({})
    except MpsError:
        return _environment(run_dir)
    return None


def check_attached(config: Settings, mps: Mps, pids: Collection[int]) -> None:
    """Log how many of the processes `pids` are clients of the daemon. With `on`, raises MpsError if some are
    not.

    Pids are compared, so clients of a daemon in another PID namespace are not recognised.
    """
    if not mps.daemon:
        return
    try:
        servers = _servers(mps.environment)
        clients = {pid for server in servers for pid in _pids(f"get_client_list {server}", mps.environment)}
        attached = len(clients & set(pids))
        text = f"using {mps.daemon}; {attached} of {len(pids)} GPU processes are attached"
        missing = attached < len(pids)
    except MpsError as error:
        text, missing = f"using {mps.daemon}, which does not answer: {error}", True
    if missing and config.mps == "on":
        raise MpsError(f"--mps on: {text}")
    log.log(logging.WARNING if missing else logging.INFO, "MPS: %s", text)


def stop(run_dir: RunDir) -> None:
    """Stop the daemon that was started for this server, if any, and its servers. Their clients must have
    exited. Does not raise; may be called by several processes."""
    pipes = run_dir.root / PIPES
    if not pipes.is_dir():
        return
    environment = _environment(run_dir)
    family = [*_daemon(pipes)]
    with contextlib.suppress(MpsError):
        family += _servers(environment)
        _ask(f"quit -t {QUIT_SECONDS}", environment)
    deadline = time.monotonic() + QUIT_SECONDS + 1
    for pid in family:
        pidfd = process.open_pidfd(pid)
        if pidfd is not None:
            process.wait_ended(pidfd, deadline - time.monotonic())
            os.close(pidfd)
    process.kill_all(_alive(family))
    shutil.rmtree(pipes, ignore_errors=True)


# -- using an existing daemon


def _running_daemon_works() -> bool:
    try:
        servers = _servers({})
    except MpsError:
        return False
    try:
        _check_owner(servers)
        _probe({})
    except MpsError as error:
        log.warning("MPS: the running daemon cannot be used: %s", error)
        return False
    return True


def _away_from_running_daemon(run_dir: RunDir) -> dict[str, str]:
    """Return an environment that leads to no daemon, so that no stage waits for a broken one."""
    try:
        _servers({})
    except MpsError:
        return {}
    return _environment(run_dir)


def _check_owner(servers: Sequence[int]) -> None:
    """Raise MpsError if the daemon serves another user: a server accepts clients of one user at a time, and
    others wait until those are gone."""
    for pid in servers:
        with contextlib.suppress(OSError):  # the server is in another PID namespace
            if os.stat(f"/proc/{pid}").st_uid != os.getuid():
                raise MpsError(f"its server (pid {pid}) serves another user")


# -- starting a daemon


def _environment(run_dir: RunDir) -> dict[str, str]:
    return {
        "CUDA_MPS_PIPE_DIRECTORY": str(run_dir.root / PIPES),
        "CUDA_MPS_LOG_DIRECTORY": str(run_dir.root / LOGS),
    }


def _start(run_dir: RunDir) -> dict[str, str]:
    """Start a daemon and check that it works; return the variables by which it is found. Raises MpsError
    after cleaning up."""
    environment = _environment(run_dir)
    pipes, logs = run_dir.root / PIPES, run_dir.root / LOGS
    if len(os.fsencode(pipes)) > LONGEST_PIPES:
        raise MpsError(f"{pipes} is too long for the path of sockets (--zmq_mode)")
    try:
        for directory in (pipes, logs):
            directory.mkdir(mode=0o700, exist_ok=True)
        _control(["-d"], "", environment, START_SECONDS)
        _await_answer(environment)
        _probe(environment)
    except (MpsError, OSError) as error:
        stop(run_dir)
        raise MpsError("; ".join([str(error), *_last_line(logs / "control.log")])) from error
    return environment


def _await_answer(environment: Mapping[str, str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            _servers(environment)
            return
        except MpsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _daemon(pipes: Path) -> Iterator[int]:
    """Yield the pid in the daemon's pipe directory if it is that of a running daemon."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((pipes / f"{CONTROL}.pid").read_text())
        if CONTROL.startswith(Path(f"/proc/{pid}/comm").read_text().strip()):  # Linux truncates process names
            yield pid


def _alive(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if process.start_time(pid) is not None]


def _last_line(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [f"{path.name}: {line}" for line in path.read_text(errors="replace").splitlines()[-1:]]
    return []


# -- commands


def _servers(environment: Mapping[str, str]) -> list[int]:
    """Return the pids of the daemon's MPS servers: one per user, none before the first client."""
    return _pids("get_server_list", environment)


def _pids(command: str, environment: Mapping[str, str]) -> list[int]:
    return [int(line) for line in _ask(command, environment).splitlines() if line.strip().isdigit()]


def _ask(command: str, environment: Mapping[str, str]) -> str:
    """Return the daemon's answer. Raises MpsError if there is none."""
    return _control([], command + "\n", environment)


def _control(
    arguments: Sequence[str], commands: str, environment: Mapping[str, str], seconds: float = ANSWER_SECONDS
) -> str:
    variables = {**os.environ, **environment}
    # The daemon exposes every GPU. Clients choose theirs with their own variable, whose indices would
    # otherwise be applied twice.
    if arguments:
        variables.pop("CUDA_VISIBLE_DEVICES", None)
    code, output = _run([CONTROL, *arguments], commands, variables, seconds)
    if code != 0 or "cannot find" in output.lower():
        raise MpsError(f"{CONTROL}: {output or f'exit code {code}'}")
    return output


def _probe(environment: Mapping[str, str]) -> None:
    """Let a separate process use a GPU through the daemon. Raises MpsError."""
    command = [sys.executable, "-m", "light_tts.server.supervision.mps_probe"]
    code, output = _run(command, "", {**os.environ, **environment}, PROBE_SECONDS)
    if code != 0:
        raise MpsError(f"a test process cannot use the GPU: {output or f'exit code {code}'}")


def _run(command: Sequence[str], text: str, variables: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Return exit code and output. The output goes to a file, because a daemon would keep a pipe open
    forever."""
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command,
                input=text.encode(),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise MpsError(f"{Path(command[0]).name} does not answer within {seconds:g} s") from error
        except OSError as error:
            raise MpsError(f"{command[0]}: {error}") from error
        output.seek(0)
        return done.returncode, output.read().decode(errors="replace").strip()


def _has_gpu(config: Settings) -> bool:
    return config.device != "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and gpu.visible_gpus() > 0
