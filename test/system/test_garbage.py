"""Garbage collection does not go through what a process has loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
from support.processes import find_below
from support.server_process import start_server
from support.waiting import eventually

# In every process of a server: writes the number of objects that the collector does not look at to a file
# named by the process's id, when the file `go` appears.
REPORT = """
import gc, pathlib, os, sys, threading, time

folder = pathlib.Path({folder!r})

def report():
    while not (folder / "go").exists():
        time.sleep(0.05)
    part = folder / f"{{os.getpid()}}.part"
    part.write_text(str(gc.get_freeze_count()))
    part.rename(part.with_suffix(""))

def begin():
    threading.Thread(target=report, daemon=True).start()

if any(word.startswith("light_tts.server") for word in sys.orig_argv):
    begin()
    os.register_at_fork(after_in_child=begin)
"""
PROGRAM = """
import gc
from light_tts.common.garbage import spare_present_objects
loaded = [[]]
spare_present_objects()
later = [[]]
seen = {id(thing) for thing in gc.get_objects()}
print(id(loaded) in seen, id(later) in seen)
"""


def test_only_later_objects_are_looked_at():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_stages_and_http_workers_spare_what_they_have_loaded(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(REPORT.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with start_server(httpserver_workers=2) as server:
        assert eventually(lambda: len(server.workers) == 2, 30)  # the server is ready with the first
        serving: list[psutil.Process] = [*find_below(server.pid, "--stage"), *server.workers]
        assert len(serving) == 3 + 2
        (tmp_path / "go").touch()
        assert eventually(lambda: all((tmp_path / str(process.pid)).exists() for process in serving), 30)
    spared = [int((tmp_path / str(process.pid)).read_text()) for process in serving]
    assert min(spared) > 20_000, spared
