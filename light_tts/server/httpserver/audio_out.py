"""Containers for outgoing audio: raw 16-bit PCM and WAV, both mono."""

from __future__ import annotations

import struct

UNKNOWN_LENGTH = 0xFFFFFFFF
_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")


def content_type(format: str, sample_rate: int) -> str:
    return "audio/wav" if format == "wav" else f"audio/L16;rate={sample_rate};channels=1"


def header(format: str, sample_rate: int, pcm_bytes: int | None) -> bytes:
    """Return the bytes that precede the PCM. `pcm_bytes` None: a WAV header of unknown length (sizes
    0xFFFFFFFF, which players read as "until the end")."""
    if format != "wav":
        return b""
    riff_size = UNKNOWN_LENGTH if pcm_bytes is None else _HEADER.size - 8 + pcm_bytes
    data_size = UNKNOWN_LENGTH if pcm_bytes is None else pcm_bytes
    byte_rate, block_bytes, bits = sample_rate * 2, 2, 16
    return _HEADER.pack(
        b"RIFF", riff_size, b"WAVE", b"fmt ", 16, 1, 1, sample_rate, byte_rate, block_bytes, bits,
        b"data", data_size,
    )  # fmt: skip
