"""Word times, sent while the speech is being made."""

from __future__ import annotations

from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.captions import Word, word_times
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.manager import HttpServerManager


def check_word_times(manager: HttpServerManager, style: int, max_pause: float | None) -> None:
    """Raise RequestError (400) if word times are not available."""
    problem = None
    if not manager.knows_word_times(style):
        problem = "this checkpoint does not name the attention heads that follow the text (alignment_heads)"
    elif max_pause is not None:
        problem = "cannot be combined with max_pause, which shifts the words"
    if problem is not None:
        raise RequestError(400, f"word_timestamps: {problem}", field="word_timestamps")


class LiveWords:
    """Returns each word of a call once, as soon as its times are known. `speed`: speed of the outgoing
    audio."""

    def __init__(self, call: SpeechCall, speed: float = 1.0) -> None:
        self._call = call
        self._speed = speed
        self._pcm: list[bytes] = []
        self._told = 0

    @property
    def seconds(self) -> float:
        """Length of the outgoing audio so far."""
        return sum(map(len, self._pcm)) / 2 / self._call.sample_rate / self._speed

    def hear(self, pcm: bytes) -> list[Word]:
        """Take the next audio; return the words that end within the audio so far."""
        self._pcm.append(pcm)
        return self._new(complete=False)

    def finish(self) -> list[Word]:
        """Return the remaining words, after the last audio."""
        return self._new(complete=True)

    def _new(self, complete: bool) -> list[Word]:
        words = word_times(self._call.request, self._pcm, self._call.sample_rate, self._speed, complete)
        told, self._told = self._told, max(self._told, len(words))
        return words[told:]
