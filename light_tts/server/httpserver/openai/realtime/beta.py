"""The beta version of the Realtime API: other names for the same events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {
    "conversation.item.added": "conversation.item.created",
    "response.output_audio.delta": "response.audio.delta",
    "response.output_audio.done": "response.audio.done",
    "response.output_audio_transcript.delta": "response.audio_transcript.delta",
    "response.output_audio_transcript.done": "response.audio_transcript.done",
}
_FORMATS = {"audio/pcm": "pcm16", "audio/pcmu": "g711_ulaw", "audio/pcma": "g711_alaw"}


def wanted(headers: Mapping[str, str], protocols: list[str]) -> bool:
    """Return whether a client that sent these headers and subprotocols uses the beta."""
    return headers.get("openai-beta") == "realtime=v1" or "openai-beta.realtime-v1" in protocols


def as_beta(event: dict[str, Any]) -> dict[str, Any] | None:
    """Return the event in the beta's form, or None if the beta had no such event."""
    if event["type"] == "conversation.item.done":
        return None
    return {**_renamed(event), "type": _TYPES.get(event["type"], event["type"])}


def _renamed(value: Any) -> Any:
    """Rename `output_audio` to `audio` and flatten `audio.output`."""
    if isinstance(value, list):
        return [_renamed(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    value = {name: _renamed(entry) for name, entry in value.items()}
    if value.get("type") == "output_audio":
        value["type"] = "audio"
    if "output_modalities" in value:
        output = value.pop("audio")["output"]
        value.update(
            modalities=["audio", "text"],
            voice=output["voice"],
            speed=output["speed"],
            output_audio_format=_FORMATS[output["format"]["type"]],
        )
        del value["output_modalities"]
    return value
