"""Serialization of messages: one ZeroMQ multipart message each, a msgpack header followed by the raw
frames.
"""

from __future__ import annotations

import threading
from typing import Any, Union

import msgspec

from light_tts.server.core.messages import Message, Raw

PROTOCOL_VERSION = 1

_ANY: Any = Union[tuple(Message.__subclasses__())]  # noqa: UP007 (built from a list)


def encode(message: Message) -> list[Any]:
    """Return the frames to send: version byte and msgpack header, then the raw frames."""
    frames: list[Any] = []

    def take_raw(obj: Any) -> int:
        if isinstance(obj, Raw):
            frames.append(obj.data)
            return len(frames)
        raise TypeError(f"cannot send {type(obj)} in a message")

    header = msgspec.msgpack.Encoder(enc_hook=take_raw).encode(message)
    return [bytes((PROTOCOL_VERSION,)) + header, *frames]


class _Frames(threading.local):
    """The frames of the message that this thread is decoding."""

    frames: list[Any]


_decoding = _Frames()


def _give_raw(kind: type, obj: Any) -> Any:
    frames = _decoding.frames
    if kind is Raw and isinstance(obj, int) and 0 < obj < len(frames):
        return Raw(frames[obj])
    raise ValueError(f"bad {kind.__name__} field")


_DECODER = msgspec.msgpack.Decoder(_ANY, dec_hook=_give_raw)  # creating one costs ten times a decode


def decode(frames: list[Any]) -> Message:
    """Return the message in these frames. Raises ValueError for another protocol version or a malformed
    message."""
    header = memoryview(frames[0])
    if len(header) < 1 or header[0] != PROTOCOL_VERSION:
        raise ValueError("message of another protocol version")
    _decoding.frames = frames
    try:
        return _DECODER.decode(header[1:])
    finally:
        _decoding.frames = []
