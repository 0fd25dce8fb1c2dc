"""The unattended run of all trainings: what it starts, stops and leaves behind."""

import os
import time

import pytest
import torch
from support.server_process import VOICE
from support.waiting import eventually

from training import train_all
from training.checkpoint import training_file
from training.export import restore
from training.train_all import Steps, Stopped

# A training that says what it was told and saves its weights when it is asked to end.
TRAINING = """
import signal, sys, threading
from pathlib import Path
import torch

print(sys.argv[1:], flush=True)
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
print("ready", flush=True)
ended.wait(60)
path = Path(sys.argv[2]) / "training" / "flow.pt"
weights = {"weight": torch.ones(2), "steps": torch.tensor(3)}
averaged = {**weights, "weight": torch.zeros(2)}
torch.save({"flow": {"model": weights, "average": averaged}, "minutes": 2.0}, path)
"""


@pytest.fixture
def steps(tmp_path, monkeypatch):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "flow_matching.py").write_text(TRAINING)
    monkeypatch.setenv("PYTHONPATH", str(scripts))
    steps = Steps(tmp_path / "work", tmp_path / "out", minutes=1.0)
    yield steps
    steps.stop_all()


def test_a_stopped_training_leaves_its_weights_in_half_precision(steps, tmp_path):
    log = tmp_path / "work" / "logs" / "flow.log"
    steps.train("flow", "flow_matching", gpu=0, minutes=5.0)
    assert eventually(lambda: "ready" in log.read_text(), 60)
    steps.stop_all()
    steps.pack()
    packed = torch.load(tmp_path / "out" / "flow.pt", weights_only=True)
    assert packed["minutes"] == 2.0
    for weights in (packed["flow"]["model"], packed["flow"]["average"]):
        assert weights["weight"].dtype == torch.float16
        assert weights["weight"].tolist() == [0.0, 0.0]  # the average
        assert weights["steps"] == 3
    assert "ready" in (tmp_path / "out" / "report.txt").read_text()


def test_weights_written_while_others_are_packed_are_packed_next(steps, tmp_path, monkeypatch):
    path = training_file(tmp_path / "work", "flow")
    torch.save({"minutes": 1.0}, path)
    pack = train_all.pack

    def slow(source, target):
        pack(source, target)
        torch.save({"minutes": 2.0}, path)
        os.utime(target, (time.time() + 5,) * 2)

    monkeypatch.setattr(train_all, "pack", slow)
    steps.pack()
    monkeypatch.setattr(train_all, "pack", pack)
    steps.pack()
    assert torch.load(tmp_path / "out" / "flow.pt", weights_only=True)["minutes"] == 2.0


def test_a_training_that_goes_on_has_its_minutes_behind_it(steps, tmp_path):
    """So that its learning rate goes on falling from where it was."""
    log = tmp_path / "work" / "logs" / "flow.log"
    for started in (1, 2):
        steps.train("flow", "flow_matching", gpu=0, minutes=5.0)
        assert eventually(lambda: log.read_text().count("ready") == started, 60)  # noqa: B023
        steps.stop("flow")
    first, second = (line for line in log.read_text().splitlines() if line.startswith("["))
    assert "'--minutes', '5.0', '--total', '5.0'" in first
    assert "'--minutes', '5.0', '--total', '7.0'" in second


def test_time_that_is_up_ends_the_waiting(tmp_path):
    steps = Steps(tmp_path / "work", tmp_path / "out", minutes=0.0)
    with pytest.raises(Stopped):
        steps.wait(lambda: False)


def test_the_trainings_go_on_from_the_checkpoint_in_the_repository(tmp_path):
    restore.restore(VOICE, tmp_path)
    saved = {name: restore.read(tmp_path / "training" / f"{name}.pt") for name in restore.TRAININGS}
    assert all(state["steps"] > 0 and state["minutes"] > 0 for state in saved.values())
    served = restore.read(VOICE / "hift.pt")
    assert all(torch.equal(saved["vocoder"]["model"]["average"][name], served[name]) for name in served)
    assert saved["vocoder"]["discriminators"]["average"]
    assert "phoneme_decoder.weight" in saved["language_model"]["model"]["model"]


@pytest.mark.parametrize("languages", [["en"], ["en", "zh"]])
def test_what_is_to_be_spoken_is_made_where_it_is_missing(languages, tmp_path, monkeypatch):
    steps, work, begun = Steps(tmp_path, tmp_path / "out", minutes=1.0), tmp_path, []
    makes = {
        "sentences": "sentences.jsonl",
        "mandarin": "mandarin.jsonl",
        "utterances": "utterances.jsonl",
    }

    def start(name: str, module: str, *options: object) -> str:
        begun.append((name, options))
        if name in makes:
            (work / makes[name]).touch()
        return name

    monkeypatch.setattr(steps, "start", start)
    spoken = ("--languages", *languages)
    train_all.prepare(steps, work, languages, hours=3.0)
    texts = [(name, ()) for name in ("sentences", "mandarin")[: len(languages)]]
    assert begun == [
        ("packages", spoken),
        *texts,
        ("utterances", (*spoken, "--hours", 3.0)),
        ("text_tokenizer", spoken),
    ]
    begun.clear()
    train_all.prepare(steps, work, languages, hours=3.0)
    assert begun == [("text_tokenizer", spoken)]


def test_a_step_of_the_preparation_that_fails_ends_the_run(tmp_path, monkeypatch):
    steps = Steps(tmp_path, tmp_path / "out", minutes=1.0)
    monkeypatch.setattr(steps, "start", lambda name, module, *options: name)
    with pytest.raises(Stopped):
        train_all.prepare(steps, tmp_path, ["en"], hours=3.0)
    assert "sentences.jsonl is missing" in (tmp_path / "logs" / "run.log").read_text()
