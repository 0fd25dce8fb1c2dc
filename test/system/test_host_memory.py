"""How much of the host's memory the flow's cached state takes on a CPU (--flow_memory_mb)."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from support.server_process import CHECKPOINT

from light_tts.cli import machine
from light_tts.cli.findings import Findings
from light_tts.server.core import host_memory
from light_tts.server.core.settings import Settings

GIB = 1 << 30


@pytest.mark.parametrize(
    ("total", "decode", "expected"), [(16, 1, 4), (16, 2, 2), (24, 1, 6), (8, 3, 1), (2, 1, 1)]
)
def test_automatic_size(monkeypatch, total, decode, expected):
    monkeypatch.setattr(host_memory, "memory", lambda: total * GIB)
    settings = Settings(model_dir=str(CHECKPOINT), decode_process_num=decode)
    assert host_memory.flow_memory(settings) == expected * GIB


@pytest.mark.parametrize("given", [0, 300])
def test_a_given_size_is_taken_as_it_is(given):
    assert host_memory.flow_memory(Settings(flow_memory_mb=given)) == given << 20


def group(root: Path, path: str, limit: str) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")


def this_process(root: Path, cgroup: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)


def test_the_memory_is_that_of_the_machine_without_a_smaller_limit(tmp_path):
    total = psutil.virtual_memory().total
    assert host_memory.memory(tmp_path) == total  # no control groups
    this_process(tmp_path, "0::/system.slice/light-tts.service\n")
    group(tmp_path, "system.slice", str(4 * total))
    group(tmp_path, "system.slice/light-tts.service", "max")
    assert host_memory.memory(tmp_path) == total
    assert host_memory.memory() <= total


@pytest.mark.parametrize(
    ("path", "limited"),
    [("/system.slice/light-tts.service", "system.slice/light-tts.service"), ("/a/b/c", "a"), ("/", "")],
    ids=["a service", "a group around it", "a container"],
)
def test_the_memory_is_the_limit_of_a_control_group(tmp_path, path, limited):
    this_process(tmp_path, f"1:name=systemd:/\n0::{path}\n")
    group(tmp_path, limited, str(GIB // 2))
    assert host_memory.memory(tmp_path) == GIB // 2


def test_the_doctor_shows_what_may_be_used(monkeypatch, capsys):
    monkeypatch.setattr(machine, "memory", lambda: 500_000_000)
    machine.look(Findings())
    assert " of 0.5 GB free" in capsys.readouterr().out
