"""POST /v1/text-to-speech/{voice_id}/with-timestamps: the speech and the time of each character."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request, Response

from light_tts.server.httpserver.captions import Word
from light_tts.server.httpserver.elevenlabs.common import DEFAULT_FORMAT, explain
from light_tts.server.httpserver.elevenlabs.speech import TextToSpeech, spoken_answer
from light_tts.server.httpserver.openapi import body_of
from light_tts.server.httpserver.sound.response import JsonResponse
from light_tts.server.httpserver.surface import route_class

router = APIRouter(route_class=route_class(explain))


@router.post(
    "/v1/text-to-speech/{voice_id}/with-timestamps",
    openapi_extra=body_of(TextToSpeech, more=(404,)),
    response_class=Response,
)
async def with_timestamps(request: Request, voice_id: str, output_format: str = DEFAULT_FORMAT) -> Response:
    """Return the complete speech in base64 with the times of its characters, which are null if the checkpoint
    provides no word times."""
    return await spoken_answer(request, voice_id, output_format, whole=True, kind=TimedResponse)


class TimedResponse(JsonResponse):
    def answer(self, audio: bytes) -> dict[str, Any]:
        times = alignment(self.words())
        return {
            "audio_base64": base64.b64encode(audio).decode(),
            "alignment": times,
            "normalized_alignment": times,
        }


class LiveAlignment:
    """Makes the alignments of one conversation's messages. Times count from the end of the previous
    alignment; every word but the first is preceded by a blank."""

    def __init__(self) -> None:
        self._begin = 0.0  # seconds from the first audio of the conversation to that of the utterance
        self._end = 0.0  # of the latest alignment

    def of(self, words: list[Word]) -> dict[str, list[Any]] | None:
        """`words`: with times relative to the start of the current utterance."""
        times = alignment([Word(w.text, self._begin + w.start, self._begin + w.end) for w in words])
        if times is None:
            return None
        characters = times["characters"]
        starts = [round(1000 * (second - self._end)) for second in times["character_start_times_seconds"]]
        ends = [round(1000 * (second - self._end)) for second in times["character_end_times_seconds"]]
        if self._end:
            characters, starts, ends = [" ", *characters], [0, *starts], [starts[0], *ends]
        self._end = self._begin + words[-1].end
        durations = [end - start for start, end in zip(starts, ends, strict=True)]
        return {"chars": characters, "charStartTimesMs": starts, "charDurationsMs": durations}

    def next_utterance(self, seconds: float) -> None:
        """The current utterance has ended after `seconds` of audio."""
        self._begin += seconds


def alignment(words: list[Word]) -> dict[str, list[Any]] | None:
    """Return the times of all characters: a word's time is divided evenly among its characters, and the gap
    between two words belongs to the space."""
    characters: list[str] = []
    starts: list[float] = []
    ends: list[float] = []

    def spread(text: str, start: float, end: float) -> None:
        step = (end - start) / len(text)
        for index, character in enumerate(text):
            characters.append(character)
            starts.append(round(start + index * step, 3))
            ends.append(round(start + (index + 1) * step, 3))

    for word in words:
        if characters:
            spread(" ", ends[-1], word.start)
        spread(word.text, word.start, word.end)
    if not characters:
        return None
    return {
        "characters": characters,
        "character_start_times_seconds": starts,
        "character_end_times_seconds": ends,
    }
