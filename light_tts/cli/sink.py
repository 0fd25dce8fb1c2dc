"""Outputs for PCM: a file of any supported format, or the loudspeaker."""

from __future__ import annotations

import os
import shutil
import subprocess
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Protocol

from light_tts.cli.client import Problem

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer

# Extension -> FFmpeg codec, and its bit rate if it has a choice.
CODECS: dict[str, tuple[Literal["libmp3lame", "libopus", "aac", "flac"], int | None]] = {
    ".mp3": ("libmp3lame", 96_000),
    ".opus": ("libopus", 48_000),
    ".ogg": ("libopus", 48_000),
    ".m4a": ("aac", 96_000),
    ".aac": ("aac", 96_000),
    ".flac": ("flac", None),
}
EXTENSIONS = (".wav", *CODECS)

# Programs that play raw 16-bit mono samples from standard input; {rate} is replaced.
PLAYERS = (
    "pw-cat --playback --raw --format s16 --rate {rate} --channels 1 -",
    "paplay --raw --format=s16le --rate={rate} --channels=1",
    "aplay -q -t raw -f S16_LE -r {rate} -c 1",
    "play -q -t raw -e signed -b 16 -r {rate} -c 1 -",
    "mpv --really-quiet --no-video --demuxer=rawaudio --demuxer-rawaudio-format=s16le"
    " --demuxer-rawaudio-rate={rate} --demuxer-rawaudio-channels=1 -",
    "ffplay -loglevel error -nodisp -autoexit -f s16le -ar {rate} -i -",
)


class Sink(Protocol):
    def write(self, pcm: bytes) -> None:
        """Write complete 16-bit mono samples."""


def check_path(path: Path) -> None:
    """Raise Problem if a file of this name cannot be written."""
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise Problem(f"-o {path}: the name must end with one of {', '.join(EXTENSIONS)}")
    if extension != ".wav" and find_spec("av") is None:
        raise Problem(f"-o {path}: {extension} needs PyAV: pip install av")
    if not path.parent.is_dir():
        raise Problem(f"-o {path}: there is no directory {path.parent}")


@contextmanager
def file_sink(path: Path, rate: int) -> Iterator[Sink]:
    """Context manager for a file that gets its final name only when it is complete."""
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        with (_wav if path.suffix.lower() == ".wav" else _coded)(unfinished, rate) as sink:
            yield sink
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _wav(path: Path, rate: int) -> Iterator[Sink]:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        yield _Wav(file)


class _Wav:
    def __init__(self, file: wave.Wave_write) -> None:
        self.write = file.writeframesraw


@contextmanager
def _coded(path: Path, rate: int) -> Iterator[Sink]:
    import av

    codec, bit_rate = CODECS[path.suffix.lower()]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        yield _Coded(container, stream, rate)
        container.mux(stream.encode(None))


class _Coded:
    def __init__(self, container: OutputContainer, stream: AudioStream, rate: int) -> None:
        self._container, self._stream, self._rate = container, stream, rate
        self._position = 0

    def write(self, pcm: bytes) -> None:
        import av
        import numpy as np

        samples = np.frombuffer(pcm, np.int16)
        if not len(samples):
            return
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = self._rate, self._position
        self._position += len(samples)
        self._container.mux(self._stream.encode(frame))


def find_player() -> str:
    """Return the command of the first installed player. Raises Problem."""
    for player in PLAYERS:
        if shutil.which(player.partition(" ")[0]):
            return player
    names = ", ".join(player.partition(" ")[0] for player in PLAYERS)
    raise Problem(f"no player for the loudspeaker is installed ({names}); write a file: -o speech.wav")


@contextmanager
def loudspeaker(player: str, rate: int) -> Iterator[IO[bytes]]:
    """Context manager for the loudspeaker, which takes whole 16-bit mono samples; waits until everything has
    been played. Raises Problem if the player fails."""
    command = player.format(rate=rate).split()
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None  # a pipe
    try:
        yield process.stdin
        process.stdin.close()
        process.wait()
    except BrokenPipeError:
        pass
    finally:
        if process.poll() is None and not process.stdin.closed:
            process.terminate()
        process.wait()
    if process.returncode:
        raise Problem(f"{command[0]} ended with code {process.returncode}; write a file: -o speech.wav")
