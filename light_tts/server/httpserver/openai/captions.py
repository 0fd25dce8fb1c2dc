"""POST /dev/captioned_speech: audio with word times, in the format of Kokoro-FastAPI, and subtitles."""

from __future__ import annotations

import base64
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from light_tts.server.httpserver.arrival import closed_on_error
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.captions import srt, vtt
from light_tts.server.httpserver.openai.errors import explain
from light_tts.server.httpserver.openai.fields import CreateSpeech
from light_tts.server.httpserver.openai.speech import admitted_speech, wishes
from light_tts.server.httpserver.openapi import body_of
from light_tts.server.httpserver.sound import SoundOut
from light_tts.server.httpserver.sound.response import JsonResponse
from light_tts.server.httpserver.surface import HttpArrival, route_class

router = APIRouter(route_class=route_class(explain))

_WRITERS = {"srt": srt, "vtt": vtt}


class CaptionedSpeech(CreateSpeech):
    """The fields of POST /v1/audio/speech; the response is always complete."""

    stream: Literal[False] = Field(False, description="never")
    stream_format: None = None
    word_timestamps: Literal[True] = Field(True, description="always on")
    subtitles: Literal["srt", "vtt"] | None = Field(None, description="also return subtitles in this format")


@router.post(
    "/dev/captioned_speech", openapi_extra=body_of(CaptionedSpeech, more=(404,)), response_class=Response
)
async def captioned_speech(request: Request) -> Response:
    """Return `audio` in base64, `timestamps` as `{"word", "start_time", "end_time"}` in seconds, and
    `subtitles` if requested."""
    arrival = HttpArrival(request, "captioned_speech")
    with closed_on_error(arrival):
        fields = await arrival.fields(CaptionedSpeech)
        sound = SoundOut(wishes(fields), arrival.manager.sample_rate)
        call = arrival.submit(await admitted_speech(arrival, fields, request))
    return CaptionedResponse(call, sound, fields.subtitles)


class CaptionedResponse(JsonResponse):
    """Speech with word times and optional subtitles. `subtitles`: srt, vtt or None."""

    def __init__(self, call: SpeechCall, sound: SoundOut, subtitles: str | None) -> None:
        super().__init__(call, sound, explain)
        self._subtitles = subtitles

    def answer(self, audio: bytes) -> dict[str, Any]:
        words = self.words()
        answer: dict[str, Any] = {
            "audio": base64.b64encode(audio).decode(),
            "audio_format": self.sound.content_type,
            "timestamps": [
                {"word": word.text, "start_time": round(word.start, 3), "end_time": round(word.end, 3)}
                for word in words
            ],
        }
        if self._subtitles is not None:
            answer["subtitles"] = _WRITERS[self._subtitles](words)
        return answer
