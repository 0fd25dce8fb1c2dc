"""The operator's commands: run.sh, the start scripts, deploy.sh, the systemd unit, GPU memory settings."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import yaml
from support.script_process import environment, running
from support.server_process import CHECKPOINT, ROOT, free_port
from support.waiting import eventually


def workers_of(script, count: int) -> int:
    """How many HTTP workers there are; the first answers before the last is forked, so wait for `count`."""
    deadline = time.monotonic() + 10
    while True:
        found = len(psutil.Process(script.process.pid).children()) - 1  # without the supervisor
        if found == count or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def test_run_sh_starts_the_stages_once_for_all_its_workers(tmp_path):
    with running(tmp_path, ["bash", str(ROOT / "run.sh")], WORKERS=3, HOST="127.0.0.1") as script:
        stages = script.stages()
        assert len(stages) == 3
        supervisor = {stage.parent().pid for stage in stages}
        assert len(supervisor) == 1
        assert workers_of(script, count=3) == 3
        shared = str(max(1, len(os.sched_getaffinity(0)) // 3))
        for stage in stages:
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                assert stage.environ()[name] == shared
        assert script.ask("/healthz").status_code == 200
    assert "serving on" in (tmp_path / "logs" / "light-tts.log").read_text()


def test_run_sh_names_a_wrong_flag(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "run.sh"), "--load_trt", "perhaps"],
        env=environment(MODEL_DIR=CHECKPOINT),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--load_trt perhaps" in done.stderr


def test_the_wrapper_refuses_to_be_imported_outside_gunicorn():
    done = subprocess.run(
        [sys.executable, "-c", "import wsgi_wrapper"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "run.sh" in done.stderr


@pytest.mark.parametrize(
    ("name", "decode", "workers"),
    [
        ("start-2workers", 2, 3),
        pytest.param("start-3workers", 3, 4, marks=pytest.mark.nightly),
    ],
)
def test_start_scripts_start_as_they_stand(tmp_path, name, decode, workers):
    with running(tmp_path, ["bash", str(ROOT / "scripts" / f"{name}.sh")]) as script:
        stages = [" ".join(stage.cmdline()) for stage in script.stages()]
        assert sum("--stage decode" in line for line in stages) == decode
        assert workers_of(script, count=workers) == workers


def test_deploy_sh_starts_a_healthy_server_in_the_background(tmp_path):
    port = free_port()
    files = {
        "LOG_FILE": tmp_path / "console.log",
        "PID_FILE": tmp_path / "server.pid",
        "LIGHT_TTS_CONFIG": tmp_path / "production.yaml",
        "LOG_DIR": tmp_path / "logs",
    }
    variables = environment(PORT=port, HOST="127.0.0.1", **files)
    by_hand = "gpt_paral_num: 7\ndecode_process_num: 5\n"
    files["LIGHT_TTS_CONFIG"].write_text(by_hand)
    command = ["bash", str(ROOT / "scripts" / "deploy.sh"), str(CHECKPOINT), "1", "2"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    pid = int(files["PID_FILE"].read_text())
    try:
        for path in ("/inference_zero_shot", "/healthz", "/metrics"):
            assert f"http://127.0.0.1:{port}{path}" in done.stdout
        settings = yaml.safe_load(files["LIGHT_TTS_CONFIG"].read_text())
        assert (settings["decode_process_num"], settings["httpserver_workers"]) == (1, 2)
        assert settings["gpt_paral_num"] == 7
        assert (tmp_path / "production.yaml.bak").read_text() == by_hand
        assert not (tmp_path / "production.yaml.new").exists()
        assert httpx.get(f"http://127.0.0.1:{port}/readiness").status_code == 200
        assert (files["LOG_DIR"] / "light-tts.log").exists()
        again = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert again.returncode == 1 and f"pid {pid}" in again.stderr
    finally:
        server = psutil.Process(pid)
        server.terminate()
        server.wait(30)
    assert not list(Path("/dev/shm").glob(f"light_tts-{port}-*"))


def test_deploy_sh_names_what_the_model_lacks(tmp_path):
    (tmp_path / "model").mkdir()
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "deploy.sh"), str(tmp_path / "model")],
        env=environment(LIGHT_TTS_CONFIG=tmp_path / "production.yaml"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "cosyvoice2.yaml" in done.stderr
    assert not (tmp_path / "production.yaml").exists()


def test_an_interrupted_deploy_sh_stops_what_it_started(tmp_path):
    config, pid_file = tmp_path / "production.yaml", tmp_path / "logs" / "light-tts.pid"
    config.write_text("gpt_paral_num: 7\n")
    deploy = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "deploy.sh"), str(CHECKPOINT), "1", "1"],
        env=environment(
            PORT=free_port(), HOST="127.0.0.1", LIGHT_TTS_CONFIG=config, LOG_DIR=tmp_path / "logs"
        ),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert eventually(lambda: pid_file.exists() and bool(pid_file.read_text().strip()), 60)
    server = psutil.Process(int(pid_file.read_text()))
    deploy.send_signal(signal.SIGTERM)
    _, errors = deploy.communicate(timeout=30)
    assert deploy.returncode == 1 and "interrupted" in errors
    server.wait(30)
    assert config.read_text() == "gpt_paral_num: 7\n"
    assert not pid_file.exists() and not config.with_name("production.yaml.new").exists()


def test_deploy_sh_shows_the_end_of_the_log_when_the_server_fails(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    (model / "llm.pt").write_bytes(b"broken")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "deploy.sh"), str(model), "1", "1"],
        env=environment(
            PORT=free_port(),
            HOST="127.0.0.1",
            LIGHT_TTS_CONFIG=tmp_path / "production.yaml",
            LOG_DIR=tmp_path / "logs",
        ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "llm-0 cannot start" in done.stderr and "llm.pt" in done.stderr
    assert not (tmp_path / "logs" / "light-tts.pid").exists()


def test_the_systemd_unit_is_valid_and_restarts_on_failure():
    unit = (ROOT / "scripts" / "light-tts.service").read_text()
    assert re.search(r"^Type=(notify|exec)$", unit, re.M)
    assert re.search(r"^Restart=on-failure$", unit, re.M)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(ROOT / "scripts" / "light-tts.service")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "light-tts.service" not in done.stderr, done.stderr


def memory_config():
    spec = importlib.util.spec_from_file_location("memory_config", ROOT / "config" / "memory_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("gpu", "gpus", "llm", "decode", "expected"),
    [(0, 1, 1, 3, 4), (0, 2, 1, 3, 3), (1, 2, 1, 3, 1), (1, 2, 2, 1, 0)],
)
def test_gpu_memory_is_shared_by_the_processes_on_that_gpu(gpu, gpus, llm, decode, expected):
    config = memory_config()
    sharing = config.processes_on_gpu(gpu, gpus, llm, decode)
    assert sharing == expected
    assert config.memory_fraction(sharing) * max(1, sharing) < 1


def test_a_process_prepares_for_a_gpu_that_is_not_there():
    config = memory_config()
    assert torch.cuda.is_available() or config.optimize_gpu_memory(0, 2) is None
    assert torch.multiprocessing.get_sharing_strategy() == "file_system"


def test_gpu_memory_can_be_watched_on_any_machine():
    for gpu in memory_config().monitor_gpu_memory():
        assert gpu["used"] + gpu["free"] <= gpu["total"] * 1.01


def test_bench_startup_prints_when_stages_and_first_audio_were_ready(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench_startup.py"), "--model_dir", str(CHECKPOINT)]
    command += ["--runs", "1", "--requests", "2", "--new_tokens", "30", "--json", str(figures)]
    done = subprocess.run(
        [*command, "--", "--device", "cpu", "--httpserver_workers", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("encode-0", "llm-0", "decode-0"):
        assert re.search(rf"  {stage} up after [\d.]+ s: imports [\d.]+ s", done.stdout)
    assert re.search(r"first audio of each request from readiness on, ms: \d+ \d+\n", done.stdout)
    [start] = json.loads(figures.read_text())
    assert 0 < start["stages"]["llm-0"]["up"] <= start["ready"]
    assert start["all_recorded"] is None  # there are none
    for answer in start["answers"] + start["recorded_answers"]:
        assert start["ready"] <= answer["sent"] and 0 < answer["first_audio"] <= answer["whole"]
