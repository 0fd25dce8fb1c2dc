"""When a stage process records CUDA graphs, by a clock of the test's own (see also test_llm_manager.py)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from light_tts.server.core.heartbeat import INTERVAL, Heartbeat
from light_tts.server.core.idle_recorder import QUIET_SECONDS, IdleRecorder


class Engine:
    """Has a number of graphs to record."""

    def __init__(self, unrecorded: int) -> None:
        self.recorded, self.unrecorded = 0, unrecorded

    def record_next(self) -> None:
        self.recorded, self.unrecorded = self.recorded + 1, self.unrecorded - 1


class Process:
    """A stage process that the test drives; processes of one folder share a lock."""

    def __init__(self, folder: Path, graphs: int) -> None:
        self.now = 100.0
        self.engine = Engine(graphs)
        log = logging.getLogger("light_tts.test")
        lock = folder / "recording.lock"
        self.recorder = IdleRecorder(self.engine, lock, Heartbeat(), log, lambda: self.now)

    def step(self, idle: bool = True, after: float = 0.0) -> int:
        """Return the number of graphs so far."""
        self.now += after
        self.recorder.step(idle)
        return self.engine.recorded


def test_one_graph_is_recorded_between_two_looks_at_the_messages(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        process = Process(tmp_path, 3)
        for count in (1, 2, 3):
            assert process.recorder.patience() < INTERVAL
            assert process.step() == count
        process.step()
        assert process.recorder.patience() == INTERVAL
    assert "0 CUDA graphs are recorded, 3 follow while idle" in caplog.text
    assert "recorded 3 CUDA graphs in 0.0 s while idle" in caplog.text


def test_nothing_is_recorded_while_there_are_jobs_and_shortly_afterwards(tmp_path):
    process = Process(tmp_path, 3)
    assert process.step(idle=False) == 0
    assert process.step() == 0
    assert process.step(after=QUIET_SECONDS / 2) == 0
    assert process.step(after=QUIET_SECONDS) == 1
    assert process.step(idle=False) == 1


def test_only_one_process_records_until_it_has_work_or_is_done(tmp_path):
    first, second = Process(tmp_path, 3), Process(tmp_path, 1)
    assert first.step() == 1 and second.step() == 0
    assert first.step() == 2 and second.step() == 0
    first.step(idle=False)  # it has passed on the request that arrived in the meantime
    assert second.step() == 1
    assert first.step(after=QUIET_SECONDS) == 2
    second.step()
    assert first.step() == 3


def test_a_process_that_is_gone_does_not_keep_the_others_from_recording(tmp_path):
    first, second = Process(tmp_path, 3), Process(tmp_path, 1)
    assert first.step() == 1 and second.step() == 0
    first.recorder.close()
    assert second.step() == 1


@pytest.mark.parametrize("idle", [True, False])
def test_without_graphs_a_stage_sleeps_until_the_next_heartbeat(tmp_path, idle):
    process = Process(tmp_path, 0)
    process.step(idle)
    assert process.recorder.patience() == INTERVAL and not (tmp_path / "recording.lock").exists()
