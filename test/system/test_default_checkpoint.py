"""Without --model_dir, however the server is started, it takes the voice that comes with it, from the
repository or from an installed wheel. Here a copy of the repository has the small golden checkpoint in that
place."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from support.script_process import environment, running
from support.server_process import CHECKPOINT, ROOT, free_port, launch

PLACE = Path("pretrained_models") / "light-tts-mini"
NEEDED = ("run.sh", "gunicorn.conf.py", "wsgi_wrapper.py", "scripts", "light_tts")
NEEDED_FOR_WHEEL = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "config")
SPEAKERS = ["tiny_spk"]


def copy_of_repository(folder: Path, checkpoint: bool) -> Path:
    for name in (*NEEDED, *NEEDED_FOR_WHEEL):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy2(ROOT / name, folder / name)
    if checkpoint:
        shutil.copytree(CHECKPOINT, folder / PLACE)
    else:
        (folder / PLACE).mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return copy_of_repository(tmp_path_factory.mktemp("repository"), checkpoint=True)


def speakers(url: str) -> list[str]:
    return httpx.get(f"{url}/spk_list", timeout=30).json()["checkpoint_speakers"]


@pytest.mark.nightly
def test_run_sh(repository, tmp_path):
    command = ["bash", str(repository / "run.sh")]
    with running(tmp_path, command, MODEL_DIR="", WORKERS=1, HOST="127.0.0.1") as script:
        assert speakers(f"http://127.0.0.1:{script.port}") == SPEAKERS


@pytest.mark.nightly
def test_deploy_sh(repository, tmp_path):
    port = free_port()
    variables = environment(PORT=port, HOST="127.0.0.1", LOG_DIR=tmp_path / "logs")
    variables["LIGHT_TTS_CONFIG"] = str(tmp_path / "production.yaml")
    command = ["bash", str(repository / "scripts" / "deploy.sh")]
    done = subprocess.run(
        [*command, "", "1", "1"], env=variables, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        assert speakers(f"http://127.0.0.1:{port}") == SPEAKERS
    finally:
        server = psutil.Process(int((tmp_path / "logs" / "light-tts.pid").read_text()))
        server.terminate()
        server.wait(30)
    settings = yaml.safe_load((tmp_path / "production.yaml").read_text())
    assert Path(settings["model_dir"]) == repository / PLACE


@pytest.mark.parametrize("script", ["start-2workers.sh", "start-3workers.sh"])
def test_start_scripts_give_a_model_only_when_they_have_got_one(script):
    def command_line(**variables: str) -> list[str]:
        command = ["bash", str(ROOT / "scripts" / script)]
        variables = environment(**variables) | {"PYTHON": "/bin/echo"}
        return subprocess.run(command, env=variables, capture_output=True, text=True).stdout.split(" --")

    assert not [flag for flag in command_line() if flag.startswith("model_dir")]
    assert "model_dir /some where" in command_line(MODEL_DIR="/some where")


@pytest.fixture(scope="module")
def installed(repository, tmp_path_factory) -> Path:
    """The Python of an environment into which a wheel was installed that a source distribution gave."""
    folder = tmp_path_factory.mktemp("wheel")

    def run(*command: object) -> None:
        done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    pack = "import os, sys, setuptools.build_meta as s; os.chdir(sys.argv[1]); s.build_sdist(sys.argv[2])"
    run(sys.executable, "-c", pack, repository, folder)
    [source] = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "source", filter="data")
    [unpacked] = (folder / "source").iterdir()
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", unpacked, "-w", folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *folder.glob("*.whl"))
    [site] = (folder / "venv" / "lib").glob("*/site-packages")
    # The packages that are there, but not this repository, to which a .pth file there may lead.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_an_installed_wheel(installed, monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    find = "from light_tts.server.core.gpu_memory import config_file; print(config_file())"
    found = subprocess.run([installed, "-c", find], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "site-packages/light_tts/config/memory_config.py" in found.stdout
    with launch(model_dir=None, python=installed, cwd=tmp_path) as server:
        assert speakers(server.url) == SPEAKERS


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "light_tts.server.api_server"],
        ["bash", "run.sh"],
        ["bash", "scripts/deploy.sh"],
    ],
)
def test_where_it_is_missing_one_line_says_where_to_get_it(tmp_path, command):
    folder = copy_of_repository(tmp_path, checkpoint=False)
    variables = environment(LIGHT_TTS_CONFIG="", PYTHONPATH="", LOG_DIR=tmp_path / "logs", PORT=free_port())
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("light-tts: error: --model_dir") and str(folder / PLACE) in line
