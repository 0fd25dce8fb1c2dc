"""The fields of client events: session, response and item."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from light_tts.server.httpserver.fields import BodyFields, Drawing
from light_tts.server.httpserver.openai.fields import Voice
from light_tts.server.httpserver.sound import SoundWishes

MAX_ID = 128
# type -> container, default sample rate in Hz
_FORMATS = {"audio/pcm": ("pcm", 24_000), "audio/pcmu": ("ulaw", 8000), "audio/pcma": ("alaw", 8000)}
_BETA_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}


class OutputFormat(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: int | None = None

    @property
    def hertz(self) -> int:
        return self.rate or _FORMATS[self.type][1]


class SessionFields(Drawing):
    """How the session speaks: `audio.output` and its fields, or those of the beta, which are not nested.
    Fields about listening and reasoning are ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["realtime"] = "realtime"
    voice: Voice | None = None
    format: OutputFormat | None = None
    speed: float | None = Field(None, ge=0.25, le=4.0, allow_inf_nan=False)
    instructions: str | None = None  # for a language model: shown, without effect
    max_pause: float | None = Field(None, ge=0.05, le=10)
    output_modalities: list[str] = Field(default_factory=lambda: ["audio"])

    @model_validator(mode="before")
    @classmethod
    def _drop_blanks(cls, values: Any) -> Any:
        """Overrides the rule of BodyFields: lifts the fields of `audio.output`, renames those of the beta."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if "output_audio_format" in values:
            name = values.pop("output_audio_format")
            values["format"] = {"type": _BETA_FORMATS.get(name, name) if isinstance(name, str) else name}
        if "modalities" in values:
            values["output_modalities"] = values.pop("modalities")
        audio = values.pop("audio", None) or {}
        output = (audio.get("output") or {}) if isinstance(audio, dict) else None
        if not isinstance(output, dict):
            raise ValueError("audio and audio.output must be objects")
        return {**values, **{name: output[name] for name in ("voice", "format", "speed") if name in output}}

    @field_validator("output_modalities")
    @classmethod
    def _audio(cls, modalities: list[str]) -> list[str]:
        if "audio" not in modalities:
            raise ValueError("must have audio: this server only speaks")
        return ["audio"]

    def updated(self, other: SessionFields) -> SessionFields:
        """Return a copy updated with the values set in `other`."""
        named = other.model_fields_set & SessionFields.model_fields.keys()
        return self.model_copy(update={name: getattr(other, name) for name in named})

    def view(self) -> dict[str, Any]:
        """Return the fields in the form of `audio`."""
        format = self.format or OutputFormat()
        shown: dict[str, Any] = {"type": format.type}
        if format.type == "audio/pcm":
            shown["rate"] = format.hertz
        return {"output": {"format": shown, "voice": self.voice, "speed": self.speed or 1.0}}

    @property
    def wishes(self) -> SoundWishes:
        format = self.format or OutputFormat()
        container = _FORMATS[format.type][0]
        return SoundWishes(container, format.hertz, speed=self.speed or 1.0, max_pause=self.max_pause)


class ResponseFields(SessionFields):
    """`response` of response.create: deviations from the session, and the text to speak if it is not the last
    one of the conversation."""

    conversation: str | None = "auto"
    input: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None

    @property
    def differs(self) -> bool:
        """Whether it deviates from the session."""
        return bool(self.model_fields_set & SessionFields.model_fields.keys() - {"type", "output_modalities"})


class Content(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: str
    text: str = ""

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        if self.type not in ("input_text", "output_text", "text"):
            raise ValueError(f"{self.type[:64]} is not taken: this server only speaks text; send input_text")
        return self


class Item(BodyFields):
    """A message. System messages are accepted but not spoken."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = Field(None, max_length=MAX_ID)
    type: Literal["message"]
    role: Literal["user", "assistant", "system"]
    content: list[Content] = Field(min_length=1)

    @property
    def text(self) -> str:
        return " ".join(part.text for part in self.content)
