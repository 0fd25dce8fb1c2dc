"""The fields of OpenAI's speech requests, and what other servers have added to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field

from light_tts.server.httpserver.fields import Drawing, decode_base64
from light_tts.server.httpserver.remote_recordings import is_address
from light_tts.server.httpserver.sound import Format

MAX_INSTRUCTIONS = 4096


def _name_of(voice: Any) -> Any:
    """`{"id": "anna"}` means "anna"."""
    return voice["id"] if isinstance(voice, dict) and set(voice) == {"id"} else voice


def _only(recording: Any) -> Any:
    """A list of one recording means that one."""
    return recording[0] if isinstance(recording, list) and len(recording) == 1 else recording


def _sound_or_address(recording: Any) -> Any:
    """An address stays text, for RemoteRecordings."""
    return recording if isinstance(recording, str) and is_address(recording) else decode_base64(recording)


Voice = Annotated[str, BeforeValidator(_name_of)]
Reference = Annotated[bytes | str, BeforeValidator(_sound_or_address), BeforeValidator(_only)]


class SpokenSpeech(Drawing):
    """How something is spoken, in OpenAI's fields and those of vLLM-Omni. What is not known is left alone:
    clients of other servers send fields of their own."""

    model_config = ConfigDict(extra="allow")
    recordings = frozenset({"ref_audio"})

    model: str | None = Field(None, description="one of /v1/models")
    voice: Voice | None = Field(
        None,
        validation_alias=AliasChoices("voice", "speaker"),
        description='one of /v1/audio/voices: its name, or {"id": name}',
    )
    speed: float = Field(1.0, ge=0.25, le=4.0, allow_inf_nan=False)
    instructions: str | None = Field(
        None, max_length=MAX_INSTRUCTIONS, description="how to speak; needs a checkpoint that was trained so"
    )
    ref_audio: Reference | None = Field(
        None,
        description="recording of the voice to speak with, as base64 or data: URL; with --ref_audio_hosts "
        "also its address",
    )
    ref_text: str | None = Field(None, description="what is said in ref_audio")
    sample_rate: int | None = Field(None, description="Hz of the audio; default: the checkpoint's")
    max_pause: float | None = Field(
        None, ge=0.05, le=10, description="seconds to which longer pauses are shortened"
    )


class CreateSpeech(SpokenSpeech):
    """POST /v1/audio/speech"""

    input: str = Field(description="what to say")
    response_format: Format = "mp3"
    word_timestamps: bool = Field(
        False, description="say when each word is spoken; needs stream_format sse, or stream false"
    )
    stream_format: Literal["audio", "sse"] | None = None
    stream: bool | None = Field(
        None,
        description="false: the answer comes in one piece, with its length; true without stream_format: sse",
    )

    @property
    def events(self) -> bool:
        """Whether the audio is wanted as server-sent events."""
        return (self.stream_format or ("sse" if self.stream else "audio")) == "sse"

    @property
    def whole(self) -> bool:
        return self.stream is False and not self.events

    @property
    def unknown(self) -> list[str]:
        """Names of fields that mean nothing here."""
        return sorted(self.model_extra or {})
