"""The janitor: waits for the supervisor to exit. If that was not a proper shutdown, it kills the server's
remaining processes and removes its directories. Also cleans up after dead servers at startup.

    python -m light_tts.server.supervision.janitor --run_dir ROOT --supervisor PID --front PID
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from light_tts.common import process
from light_tts.server.core.rundir import PREFIX, SHARED_MEMORY, RunDir
from light_tts.server.supervision import mps

FRONT_SECONDS = 2.0  # time for the front process to notice the supervisor's end itself and stop properly
YOUNG_SECONDS = 60.0  # a young directory without processes may belong to a server that is just starting


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--supervisor", type=int, required=True)
    parser.add_argument("--front", type=int, required=True)
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    run_dir = RunDir.open(args.run_dir, "")
    run_dir.register_process()
    supervisor = process.open_pidfd(args.supervisor)
    if supervisor is not None:
        process.wait_ended(supervisor, None)
    clean(run_dir, args.front)


def clean(run_dir: RunDir, front: int) -> None:
    """Kill every process of the server and remove its directories. Does nothing if the supervisor has already
    done so."""
    process.kill_all(pid for pid in run_dir.processes() if pid != front)
    deadline = time.monotonic() + FRONT_SECONDS
    while front in run_dir.processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(5):  # the front process may have forked once more before it noticed
        left = [pid for pid in run_dir.processes() if pid != os.getpid()]
        if not left:
            break
        process.kill_all(left)
    mps.stop(run_dir)
    run_dir.remove()


def sweep(zmq_mode: str) -> list[str]:
    """Remove the directories of this user's servers whose processes are all dead; return their names."""
    removed = []
    for run_dir in _run_dirs(zmq_mode):
        if not run_dir.processes() and not _maybe_starting(run_dir):
            mps.stop(run_dir)
            run_dir.remove()
            removed.append(run_dir.root.name)
    return removed


def _run_dirs(zmq_mode: str) -> Iterator[RunDir]:
    """Yield the run directories of this user in this process's PID namespace."""
    sockets = zmq_mode.removeprefix("ipc://") if zmq_mode.startswith("ipc://") else tempfile.gettempdir()
    roots = {path.name: path for path in _ours(Path(sockets))}
    for shm in _ours(SHARED_MEMORY):
        roots.pop(shm.name, None)
        run_dir = RunDir.of_shared_memory(shm, zmq_mode)
        if run_dir is not None:
            yield run_dir
    for root in roots.values():
        yield RunDir.open(root, zmq_mode)


def _ours(parent: Path) -> list[Path]:
    found = []
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode):
                found.append(path)
    return found


def _maybe_starting(run_dir: RunDir) -> bool:
    """Return whether no process has been registered yet and the directory is young."""
    with contextlib.suppress(OSError):
        if any(run_dir.pids.iterdir()):
            return False
        return time.time() - run_dir.root.stat().st_mtime < YOUNG_SECONDS
    with contextlib.suppress(OSError):
        return time.time() - run_dir.shm.stat().st_mtime < YOUNG_SECONDS
    return False


if __name__ == "__main__":
    main()
