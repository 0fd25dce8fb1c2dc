"""Serialization of messages: one ZeroMQ multipart message each, a msgpack header followed by the raw
frames.
"""

from __future__ import annotations

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


def decode(frames: list[Any]) -> Message:
    """Return the message in these frames. Raises ValueError for another protocol version or a malformed
    message."""

    def give_raw(kind: type, obj: Any) -> Any:
        if kind is Raw and isinstance(obj, int) and 0 < obj < len(frames):
            return Raw(frames[obj])
        raise ValueError(f"bad {kind.__name__} field")

    header = memoryview(frames[0])
    if len(header) < 1 or header[0] != PROTOCOL_VERSION:
        raise ValueError("message of another protocol version")
    return msgspec.msgpack.Decoder(_ANY, dec_hook=give_raw).decode(header[1:])
