"""The fields of OpenAI's speech requests, and extensions introduced by other servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field

from light_tts.server.httpserver.fields import Drawing, decode_base64
from light_tts.server.httpserver.remote_recordings import is_address
from light_tts.server.httpserver.sound import Format

MAX_INSTRUCTIONS = 4096


def _name_of(voice: Any) -> Any:
    """Return the name: `{"id": "anna"}` means "anna"."""
    return voice["id"] if isinstance(voice, dict) and set(voice) == {"id"} else voice


def _only(recording: Any) -> Any:
    """Return the recording: a list of one stands for its element."""
    return recording[0] if isinstance(recording, list) and len(recording) == 1 else recording


def _sound_or_address(recording: Any) -> Any:
    """Decode a recording; a URL stays text, for RemoteRecordings."""
    return recording if isinstance(recording, str) and is_address(recording) else decode_base64(recording)


Voice = Annotated[str, BeforeValidator(_name_of)]
Reference = Annotated[bytes | str, BeforeValidator(_sound_or_address), BeforeValidator(_only)]


class SpokenSpeech(Drawing):
    """Speech parameters shared by the routes: OpenAI's fields and those of vLLM-Omni. Unknown fields are
    ignored, because clients of other servers send their own."""

    model_config = ConfigDict(extra="allow")
    recordings = frozenset({"ref_audio"})

    model: str | None = Field(
        None,
        description="a model from /v1/models: the checkpoint, its styles, tts-1, tts-1-hd, gpt-4o-mini-tts; "
        "default: the first",
    )
    voice: Voice | None = Field(
        None,
        validation_alias=AliasChoices("voice", "speaker"),
        description='a voice from /v1/audio/voices: its name, or {"id": name}; speaker means the same. The '
        "names of OpenAI's voices stand for voices of this server (--voice_aliases); default: the first",
    )
    speed: float = Field(1.0, ge=0.25, le=4.0, allow_inf_nan=False, description="at the same pitch")
    instructions: str | None = Field(
        None,
        max_length=MAX_INSTRUCTIONS,
        description="how to speak; 400 if the checkpoint was not trained with instructions (light-tts-mini "
        "was not), because it would read them aloud",
    )
    ref_audio: Reference | None = Field(
        None,
        description="recording of the voice, as base64 or data: URL; with --ref_audio_hosts also as a URL",
    )
    ref_text: str | None = Field(
        None,
        description="transcript of ref_audio; without it only the voice is taken, not the speaking style",
    )
    sample_rate: int | None = Field(
        None,
        description="sample rate in Hz: 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100 or 48000 "
        "(opus: 8000, 12000, 16000, 24000 or 48000); default: the checkpoint's",
    )
    max_pause: float | None = Field(
        None, ge=0.05, le=10, description="longer pauses are cut to this many seconds"
    )


class CreateSpeech(SpokenSpeech):
    """POST /v1/audio/speech"""

    input: str = Field(description="what to say, at most --max_text_length characters")
    response_format: Format = Field(
        "mp3", description="opus is in Ogg, aac is ADTS, pcm has 16 bits, little-endian; all mono"
    )
    word_timestamps: bool = Field(
        False, description="report when each word is spoken; requires stream_format sse, or stream false"
    )
    stream_format: Literal["audio", "sse"] | None = Field(
        None, description="sse: server-sent events; default: audio"
    )
    stream: bool | None = Field(
        None,
        description="false: one complete response with a length; true without stream_format: sse",
    )

    @property
    def events(self) -> bool:
        """Whether the audio is to be sent as server-sent events."""
        return (self.stream_format or ("sse" if self.stream else "audio")) == "sse"

    @property
    def whole(self) -> bool:
        return self.stream is False and not self.events

    @property
    def unknown(self) -> list[str]:
        """Names of the fields that are ignored."""
        return sorted(self.model_extra or {})
