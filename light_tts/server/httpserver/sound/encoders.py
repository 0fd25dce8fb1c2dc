"""Streaming encoders for the output formats, all mono."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

import av
import numpy as np

from light_tts.server.httpserver import audio_out

# OpenAI's formats; the telephony formats "ulaw" and "alaw" are supported as well.
Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]
FORMATS: tuple[str, ...] = get_args(Format)
SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True)
class Codec:
    """FFmpeg parameters of a format. `streamed`: options for output of unknown length; `rates`: sample rates
    the codec supports; `sample_format`: its input format."""

    name: Literal["libmp3lame", "libopus", "aac", "flac", "pcm_mulaw", "pcm_alaw"]
    container: str
    content_type: str
    bit_rate: int | None = None
    streamed: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    rates: tuple[int, ...] = SAMPLE_RATES


CODECS = {
    "mp3": Codec("libmp3lame", "mp3", "audio/mpeg", 96_000, {"write_xing": "0", "id3v2_version": "0"}),
    "opus": Codec(
        "libopus",
        "ogg",
        "audio/ogg",
        64_000,
        {"page_duration": "100000"},  # microseconds
        rates=(8000, 12000, 16000, 24000, 48000),
    ),
    "aac": Codec("aac", "adts", "audio/aac", 96_000, options={"aac_coder": "fast"}),
    "flac": Codec("flac", "flac", "audio/flac"),
    "ulaw": Codec("pcm_mulaw", "mulaw", "audio/basic"),
    "alaw": Codec("pcm_alaw", "alaw", "audio/x-alaw-basic"),
}


def content_type(format: str) -> str:
    if format in CODECS:
        return CODECS[format].content_type
    return "audio/wav" if format == "wav" else "audio/pcm"


def rates_of(format: str) -> tuple[int, ...]:
    """Return the sample rates supported by a format."""
    return CODECS[format].rates if format in CODECS else SAMPLE_RATES


class Encoder(Protocol):
    """Converts (n,) int16 to bytes of the format; `finish` returns the last ones. With `whole`, all bytes
    come from `finish` and the headers contain the correct length."""

    def push(self, samples: np.ndarray) -> bytes: ...

    def finish(self) -> bytes: ...


class RawEncoder:
    """PCM, or WAV as a header followed by PCM."""

    def __init__(self, format: str, rate: int, whole: bool) -> None:
        self._format = format
        self._rate = rate
        self._whole: list[bytes] | None = [] if whole else None
        self._header = audio_out.header(format, rate, None)

    def push(self, samples: np.ndarray) -> bytes:
        pcm = samples.astype("<i2").tobytes()
        if self._whole is not None:
            self._whole.append(pcm)
            return b""
        header, self._header = self._header, b""
        return header + pcm

    def finish(self) -> bytes:
        if self._whole is None:
            return self._header
        pcm = b"".join(self._whole)
        return audio_out.header(self._format, self._rate, len(pcm)) + pcm


class _Outlet:
    """A write-only file that collects what FFmpeg writes, to be taken by the encoder."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


class CodecEncoder:
    """A format encoded by FFmpeg."""

    def __init__(self, codec: Codec, rate: int, whole: bool) -> None:
        self._outlet = _Outlet()
        self._file = io.BytesIO() if whole else None
        options = {} if whole else {"fflags": "+flush_packets", **codec.streamed}
        self._container = av.open(self._file or self._outlet, "w", format=codec.container, options=options)
        self._stream = self._container.add_stream(
            codec.name, rate=rate, layout="mono", options=dict(codec.options)
        )
        if codec.bit_rate is not None:
            self._stream.bit_rate = codec.bit_rate
        self._rate = rate
        self._position = 0

    def push(self, samples: np.ndarray) -> bytes:
        if len(samples):
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = self._rate, self._position
            self._position += len(samples)
            self._container.mux(self._stream.encode(frame))
        return self._outlet.take()

    def finish(self) -> bytes:
        """Flush the codec, so that the last frame can be decoded."""
        if self._position:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._file.getvalue() if self._file is not None else self._outlet.take()


def encoder(format: str, rate: int, whole: bool, bit_rate: int | None = None) -> Encoder:
    """Return an encoder. `rate`: one of `rates_of(format)`; `bit_rate`: bits per second, if the format
    supports a choice."""
    if format in CODECS:
        codec = CODECS[format]
        if bit_rate is not None and codec.bit_rate is not None:
            codec = replace(codec, bit_rate=bit_rate)
        return CodecEncoder(codec, rate, whole)
    return RawEncoder(format, rate, whole)
