"""The first command, after its installation, as a newcomer runs it."""

import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import psutil
from server_process import CHECKPOINT

ROOT = Path(__file__).resolve().parent.parent


def quickstart(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/quickstart.py"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def assert_stopped(output: str) -> None:
    """No server runs with the port that the quickstart says it took."""
    port = re.search(r"--port (\d+)", output)[1]
    commands = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in commands if "light_tts.server.api_server" in words and port in words]
    assert not list(Path("/dev/shm").glob(f"light_tts-{port}-*"))


def test_quickstart_leaves_a_wav_and_no_server():
    out = ROOT / "out.wav"
    out.unlink(missing_ok=True)
    done = quickstart(MODEL_DIR="")
    assert done.returncode == 0, done.stdout + done.stderr
    with wave.open(str(out)) as speech:
        assert (speech.getframerate(), speech.getnchannels(), speech.getsampwidth()) == (24000, 1, 2)
        assert speech.getnframes() > 10_000
    assert str(out) in done.stdout and "random weights" in done.stdout
    assert_stopped(done.stdout)


def test_quickstart_names_what_is_wrong_with_the_checkpoint(tmp_path: Path):
    (tmp_path / "cosyvoice2.yaml").write_bytes((CHECKPOINT / "cosyvoice2.yaml").read_bytes())
    done = quickstart(MODEL_DIR=str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}/llm.pt" in done.stderr
    assert_stopped(done.stdout)
