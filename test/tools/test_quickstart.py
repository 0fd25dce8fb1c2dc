"""The first command, after its installation, as a newcomer runs it."""

import os
import re
import shlex
import subprocess
import sys
import wave
from pathlib import Path

import psutil
import pytest
from support.server_process import CHECKPOINT, VOICE

ROOT = Path(__file__).resolve().parents[2]


def quickstart(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/quickstart.py", *arguments],
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


@pytest.mark.parametrize(
    ("model_dir", "speaker"),
    [pytest.param(str(CHECKPOINT), "tiny_spk", marks=pytest.mark.nightly), ("", "anna")],
)
def test_quickstart_says_the_sentence_that_it_is_given(model_dir, speaker):
    out = ROOT / "out.wav"
    out.unlink(missing_ok=True)
    done = quickstart("Hello there.", MODEL_DIR=model_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    with wave.open(str(out)) as speech:
        assert (speech.getframerate(), speech.getnchannels(), speech.getsampwidth()) == (24000, 1, 2)
        seconds = speech.getnframes() / speech.getframerate()
    assert 0.4 < seconds < 6
    assert f"with the voice of {speaker}: Hello there." in done.stdout
    assert f"{out}: {seconds:.2f} s of speech" in done.stdout
    assert re.search(r"real-time factor \d+\.\d\d", done.stdout)
    [server] = re.findall(r"^Start a server: .*&& (.*)$", done.stdout, re.MULTILINE)
    flags = ["--model_dir", model_dir] if model_dir else []
    assert shlex.split(server) == ["python", "-m", "light_tts.server.api_server", *flags]
    assert f"curl http://localhost:8080/inference_zero_shot -F spk_id={speaker} " in done.stdout
    assert "Another voice: " in done.stdout
    assert_stopped(done.stdout)


def test_quickstart_sends_a_recording_to_a_checkpoint_without_speakers(tmp_path: Path):
    for file in CHECKPOINT.iterdir():
        if file.name != "spk2info.pt":
            (tmp_path / file.name).symlink_to(file)
    done = quickstart("Hello there.", MODEL_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    recording = (VOICE / "voices" / "anna.wav").relative_to(ROOT)
    assert f"with the voice of {recording}: Hello there." in done.stdout
    assert "-F prompt_wav=@voice.wav" in done.stdout and "spk_id" not in done.stdout


def test_quickstart_names_what_is_wrong_with_the_checkpoint(tmp_path: Path):
    (tmp_path / "cosyvoice2.yaml").write_bytes((CHECKPOINT / "cosyvoice2.yaml").read_bytes())
    done = quickstart(MODEL_DIR=str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}/llm.pt" in done.stderr
    assert_stopped(done.stdout)
