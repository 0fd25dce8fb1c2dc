"""Directories in which a running server keeps its sockets, settings, metrics and shared memory.

Two private directories (mode 0700) share one random name: `root` for sockets and small files, `shm` on the
shared-memory file system for prompt features and counters. Removing both removes all traces.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from light_tts.common import process

SHARED_MEMORY = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())
PREFIX = "light_tts-"
ROOT_LINK = ".root"  # link in `shm` to `root`, so that a dead server's files can be found
PIDS_LINK = ".pid_namespace"  # link in `shm` that identifies the PID namespace of the pids in `root`


@dataclass(frozen=True)
class RunDir:
    """Paths of one server. `zmq_mode` is `ipc://<directory>/` or `tcp://`."""

    root: Path
    shm: Path
    zmq_mode: str

    @classmethod
    def create(cls, zmq_mode: str, port: int) -> RunDir:
        name = f"{PREFIX}{port}-{secrets.token_hex(6)}"
        parent = (
            Path(zmq_mode.removeprefix("ipc://")) if zmq_mode.startswith("ipc://") else tempfile.gettempdir()
        )
        run = cls(Path(parent) / name, SHARED_MEMORY / name, zmq_mode)
        # Leave nothing behind if this fails half way.
        try:
            # Parents first: an intermediate directory made by `makedirs` would not be private.
            for path in (run.root, run.shm, run.metrics, run.pids):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (run.shm / ROOT_LINK).symlink_to(run.root)
            (run.shm / PIDS_LINK).symlink_to(os.readlink("/proc/self/ns/pid"))
        except OSError:
            run.remove()
            raise
        return run

    @classmethod
    def open(cls, root: Path, zmq_mode: str) -> RunDir:
        """Return the directories of a running server."""
        return cls(root, SHARED_MEMORY / root.name, zmq_mode)

    @classmethod
    def of_shared_memory(cls, shm: Path, zmq_mode: str) -> RunDir | None:
        """Return the server that this shared memory belongs to, or None if it belongs to another
        container.
        """
        try:
            if os.readlink(shm / PIDS_LINK) != os.readlink("/proc/self/ns/pid"):
                return None
            return cls(Path(os.readlink(shm / ROOT_LINK)), shm, zmq_mode)
        except OSError:
            return None

    @property
    def settings(self) -> Path:
        """The settings as JSON, read once by each process at startup."""
        return self.root / "settings.json"

    @property
    def metrics(self) -> Path:
        """Directory of Prometheus's multiprocess files."""
        return self.root / "metrics"

    @property
    def pids(self) -> Path:
        """Directory with one file per process of this server, named by pid: the processes the janitor must
        kill."""
        return self.root / "pids"

    @property
    def log(self) -> Path:
        """Socket of the log writer."""
        return self.root / "log"

    @property
    def recording_lock(self) -> Path:
        """Lock file of the process that records CUDA graphs (see core/idle_recorder.py)."""
        return self.root / "recording.lock"

    @property
    def takeover(self) -> Path:
        """Socket on which a new server requests this server's listening socket."""
        return self.root / "takeover"

    @property
    def supervisor(self) -> str:
        """Address of the supervisor's inbox (always ipc, since it is local and private)."""
        return f"ipc://{self.root}/supervisor"

    def stage_address(self, stage: str, index: int, incarnation: int) -> str:
        """Return a new inbox address for one incarnation of a stage."""
        if self.zmq_mode.startswith("tcp://"):
            return f"tcp://127.0.0.1:{process.free_port()}"
        return f"ipc://{self.root}/{stage}-{index}.{incarnation}"

    def heartbeat(self, stage: str, index: int, incarnation: int) -> Path:
        """Return the path of the heartbeat of one incarnation of a stage (see core/heartbeat.py)."""
        return self.shm / f"heartbeat-{stage}-{index}.{incarnation}"

    def worker_address(self) -> str:
        """Return the address where this HTTP worker should bind its inbox (tcp: any free port)."""
        if self.zmq_mode.startswith("tcp://"):
            return "tcp://127.0.0.1:*"
        return f"ipc://{self.root}/http-{os.getpid()}-{secrets.token_hex(3)}"

    def register_process(self, pid: int | None = None) -> None:
        """Record a process together with its start time, so that a later process with the same pid is not
        mistaken for it."""
        pid = pid or os.getpid()
        (self.pids / str(pid)).write_text(process.start_time(pid) or "")

    def forget_process(self, pid: int) -> None:
        (self.pids / str(pid)).unlink(missing_ok=True)

    def processes(self) -> list[int]:
        """Return the registered processes that are alive."""
        alive = []
        with contextlib.suppress(OSError):
            for entry in self.pids.iterdir():
                with contextlib.suppress(OSError, ValueError):
                    started = process.start_time(int(entry.name))
                    if started is not None and started == entry.read_text():
                        alive.append(int(entry.name))
        return alive

    def remove(self) -> None:
        for path in (self.shm, self.root):
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
