"""The `light-tts` command as started by a shell."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from support.server_process import CHECKPOINT, ROOT, VOICE, free_port

from light_tts.tools.evaluation.recogniser import transcribe
from light_tts.tools.evaluation.sound import read_sound
from light_tts.tools.evaluation.words import word_errors

COMMAND = [sys.executable, "-m", "light_tts.cli"]
TEXT = "The boat was on its way to the sea."
BOOK = """Chapter 1. The Boat

The boat was on its way.

It was late.

Chapter 2. The House

Nobody was there.
"""


@pytest.fixture
def server(voice_server):
    return voice_server


def run(*argv: object, code: int = 0, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, argv)], capture_output=True, text=True, cwd=ROOT, timeout=120, **options
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def seconds_of(path: Path) -> float:
    with av.open(str(path)) as file:
        return sum(frame.samples / frame.sample_rate for frame in file.decode(audio=0))


def test_a_text_becomes_a_file_that_is_understood(server, tmp_path):
    run("speak", TEXT, "-o", tmp_path / "a.wav", "--url", server.url, "--voice", "henry", "--seed", 3)
    said = transcribe(read_sound(tmp_path / "a.wav").wave16k)
    assert word_errors(TEXT, said)[0] <= 1, said
    whole = seconds_of(tmp_path / "a.wav")
    for name, speed in (("a.mp3", 1), ("a.opus", 2)):
        arguments = [
            "-o",
            tmp_path / name,
            "--url",
            server.url,
            "--voice",
            "henry",
            "--seed",
            3,
            "--speed",
            speed,
        ]
        assert name in run("speak", "-", *arguments, input=TEXT).stderr
        assert seconds_of(tmp_path / name) == pytest.approx(whole / speed, abs=0.2)


def test_a_text_is_heard(server, tmp_path):
    player = tmp_path / "aplay"
    player.write_text('#!/bin/sh\necho "$@" > "$0.args"; cat > "$0.pcm"\n')
    player.chmod(0o755)
    path = f"{tmp_path}:{Path(shutil.which('sh')).parent}"
    run("speak", "Good morning. It is late.", "--url", server.url, env={**os.environ, "PATH": path})
    assert "-r 24000" in (tmp_path / "aplay.args").read_text()
    samples = np.fromfile(tmp_path / "aplay.pcm", np.int16)
    assert len(samples) > 24_000 and np.abs(samples).max() > 1000


def heed_interrupts() -> None:
    """A shell lets its background jobs ignore SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_book_becomes_files_and_goes_on_where_it_was_broken_off(server, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    arguments = ["speak", str(book), "-o", str(tmp_path / "book.wav"), "--url", server.url, "--at_once", "1"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    kept = tmp_path / "book.wav.parts"
    end = time.monotonic() + 100
    while len(list(kept.glob("*.pcm"))) < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and not (tmp_path / "book.wav").exists()

    spoken = server.metric("light_tts_requests_total", route="openai_speech", outcome="ok")
    done = run(*arguments)
    assert "going on: " in done.stderr and not kept.exists()
    assert server.metric("light_tts_requests_total", route="openai_speech", outcome="ok") < spoken + 5
    whole = soundfile.info(tmp_path / "book.wav").duration
    assert whole > 4

    done = run(
        "speak", book, "-o", f"{tmp_path / 'chapters'}/", "--format", "wav", "--srt", "--url", server.url
    )
    names = sorted(path.name for path in (tmp_path / "chapters").glob("*.wav"))
    subtitles = (tmp_path / "chapters" / "01 Chapter 1. The Boat.srt").read_text()
    assert re.match(r"1\n00:00:00,000 --> 00:00:0\d,\d{3}\nChapter 1. The Boat\n\n2\n", subtitles)
    assert names == ["01 Chapter 1. The Boat.wav", "02 Chapter 2. The House.wav"]
    assert sum(soundfile.info(tmp_path / "chapters" / name).duration for name in names) == pytest.approx(
        whole - 0.5, abs=0.1
    )


def test_voices_are_listed_added_used_and_removed(server, tmp_path):
    assert "anna" in run("voices", "--url", server.url).stdout
    run("voices", "add", "maria", VOICE / "voices" / "anna.wav", "--url", server.url)
    assert "maria" in run("voices", "list", "--url", server.url).stdout
    run("speak", "Hello.", "--voice", "maria", "-o", tmp_path / "a.wav", "--url", server.url)
    run("voices", "remove", "maria", "--url", server.url)
    assert "404" in run("voices", "remove", "maria", "--url", server.url, code=1).stderr


def test_the_doctor_finds_a_server_well(server):
    directories = ["--log_dir", server.directory / "logs", "--spk_dir", server.directory / "voices"]
    done = run("doctor", "--url", server.url, *directories)
    assert "All is well." in done.stdout
    for stage in ("encode-0", "llm-0", "decode-0"):
        assert stage in done.stdout


def test_the_doctor_finds_none():
    done = run("doctor", "--url", f"http://127.0.0.1:{free_port()}", code=1)
    assert "Not well: answers" in done.stdout


def test_the_load_generator_is_there(server):
    done = run("bench", "--url", server.url, "--spk_id", "anna", "--number", 1, "--new_tokens", 10)
    assert "1 of 1 complete" in done.stdout


def test_without_a_server_one_is_started_for_the_time(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    prompt = ["--recording", VOICE / "voices" / "anna.wav", "--model_dir", CHECKPOINT]
    done = run("speak", TEXT, "-o", tmp_path / "a.wav", *prompt, env=environment)
    assert "starting a server" in done.stderr and (tmp_path / "a.wav").stat().st_size > 44


@pytest.mark.parametrize(
    ("argv", "code", "named"),
    [
        (["speak", "Hello.", "-o", "a.xyz"], 1, ".mp3"),
        (["speak", "Hello.", "-o", "/nowhere/a.wav"], 1, "/nowhere"),
        (["speak", "nothing.txt", "-o", "a.wav"], 1, "nothing.txt"),
        (["speak", "...", "-o", "a.wav"], 1, "nothing to speak"),
        (["speak", "Hello.", "-o", "a.wav", "--url", "http://127.0.0.1:1"], 1, "cannot be reached"),
        (["serve", "--prot", "80"], 2, "did you mean --port?"),
        (["check", "/nowhere"], 1, "/nowhere"),
        (["sing"], 2, "sing"),
    ],
)
def test_what_is_wrong_is_said(argv, code, named):
    assert named in run(*argv, code=code).stderr


def test_a_checkpoint_is_checked(tmp_path):
    directory = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, directory)
    port = str(free_port())
    found = run("check", directory, "--port", port, "--measure", "1").stdout
    assert "A server will start" in found
    assert "largest difference from flow.decoder.estimator.fp32.onnx" in found
    assert "speech, wer" in found  # measured, or how to install what measures it
    (directory / "flow.pt").write_bytes((directory / "flow.pt").read_bytes()[:1000])
    done = run("check", directory, "--port", port, code=1)
    assert "A server will not start: flow." in done.stdout and str(directory / "flow.pt") in done.stdout
    (directory / "hift.pt").unlink()
    assert "missing: hift.pt" in run("check", directory, "--port", port, code=1).stdout


def test_a_port_in_use_is_found(server):
    done = run("check", CHECKPOINT, "--quick", "--host", "127.0.0.1", "--port", server.port, code=1)
    assert "will not start: port" in done.stdout
