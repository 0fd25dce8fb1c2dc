"""Fields, formats and errors shared by the HTTP routes and the WebSockets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.sound import SoundWishes

DEFAULT_FORMAT = "mp3_44100_128"
_CONTAINERS = ("mp3", "opus", "pcm", "wav", "ulaw", "alaw")
_STATUS = {401: "invalid_api_key", 404: "voice_not_found", 429: "too_many_concurrent_requests"}


class VoiceSettings(BaseModel):
    """ElevenLabs' voice settings. Only `speed` and the extension `max_pause` have an effect; others are
    ignored."""

    model_config = ConfigDict(extra="ignore")

    speed: float | None = Field(None, ge=0.25, le=4.0, allow_inf_nan=False)
    max_pause: float | None = Field(None, ge=0.05, le=10)


def wishes(output_format: str, settings: VoiceSettings | None, whole: bool = False) -> SoundWishes:
    """Return the requested sound. `output_format`: container, sample rate and, if applicable, kbit/s, as in
    mp3_44100_128. Raises RequestError (400)."""
    container, *numbers = output_format.split("_")
    if (
        container not in _CONTAINERS
        or not 1 <= len(numbers) <= 2
        or not all(number.isascii() and number.isdigit() and len(number) <= 6 for number in numbers)
    ):
        raise RequestError(
            400,
            f"output_format {output_format[:64]!r} is unknown: {', '.join(_CONTAINERS)} are available, "
            "followed by the sample rate and kbit/s, as in mp3_44100_128 or pcm_24000",
            field="output_format",
        )
    rate, kilobits = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else None
    return SoundWishes(
        container,
        rate,
        speed=1.0 if settings is None or settings.speed is None else settings.speed,
        max_pause=None if settings is None else settings.max_pause,
        whole=whole,
        bit_rate=None if kilobits is None else 1000 * min(320, max(8, kilobits)),
    )


def error_body(error: RequestError) -> dict[str, Any]:
    """`{"detail": ...}`"""
    status = _STATUS.get(error.status, "invalid_request" if error.status < 500 else "server_error")
    return {"detail": {"status": status, "message": error.message}}


def explain(error: RequestError, headers: Mapping[str, str]) -> Response:
    return JSONResponse(error_body(error), error.status, headers)
