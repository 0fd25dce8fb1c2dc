"""Which requests are accepted: those that are served in time, as far as can be known when they come.

What is in work over all HTTP workers is counted in seconds of audio, estimated from the texts; how long it
takes is measured with every request that ends. The estimates need not be right, only alike: the measure is
in the same unit. Nobody waits for more of a long text than one part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from light_tts.server.core.counters import ActiveRequests, ServiceRate
from light_tts.server.core.messages import SpeechOptions
from light_tts.server.core.settings import Settings
from light_tts.server.httpserver.errors import RequestError

# So few requests are accepted however long they may wait, if only their deadline allows it.
ALWAYS = 16
# And so few even if it seems not to: what is measured then shows whether it does.
ALONE = 2

LATIN_PER_SECOND, CJK_PER_SECOND = 15.0, 4.5  # characters spoken
FIRST_CJK = "\u2e80"
TOKENS_PER_SECOND = 25
SECONDS_OF_A_PART = 20.0  # texts are split into parts of about this length; others have their turn between
LEAST_AUDIO = 2.0  # seconds; what every request costs besides its speech is in it
UNKNOWN_AUDIO = 10.0  # seconds, of text that is yet to come
LONGEST_RETRY = 60  # seconds


def expected_audio(text: str, options: SpeechOptions) -> float:
    """About how many seconds of audio this text gives. `text` empty: it is yet to come."""
    cjk = sum(character >= FIRST_CJK for character in text)
    spoken = (len(text) - cjk) / LATIN_PER_SECOND + cjk / CJK_PER_SECOND if text else UNKNOWN_AUDIO
    parts = max(1.0, spoken / SECONDS_OF_A_PART)
    if options.max_new_tokens is not None:
        spoken = min(spoken, parts * options.max_new_tokens / TOKENS_PER_SECOND)
    if options.min_new_tokens is not None:
        spoken = max(spoken, parts * options.min_new_tokens / TOKENS_PER_SECOND)
    return max(spoken, LEAST_AUDIO)


@dataclass
class Place:
    """An accepted request among those in work. `milliseconds`: of its audio that others wait for; `count`,
    `audio` (seconds): what was in work when it was accepted, itself included."""

    milliseconds: int
    count: int
    audio: float
    since: float
    in_work: bool = True


class Admission:
    """That of one HTTP worker, whose slot of the shared counters is `slot`."""

    def __init__(
        self,
        settings: Settings,
        active: ActiveRequests,
        rate: ServiceRate,
        slot: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = settings.max_pending_requests
        self._max_wait = settings.max_wait
        self._active = active
        self._rate = rate
        self._slot = slot
        self._clock = clock

    def admit(self, audio: float, remaining: float) -> Place:
        """Count one more request in work, of `audio` seconds and with `remaining` seconds to its deadline; to
        be undone by `leave`. Raises RequestError (429)."""
        if not self._active.try_add(self._slot, self._limit):
            raise _busy("pending", f"{self._limit} requests are in work already", 1)
        count, ahead = self._active.total(), self._active.work() / 1000
        try:
            self._check(count, ahead, audio, remaining)
        except RequestError:
            self._active.remove(self._slot)
            raise
        milliseconds = round(min(audio, SECONDS_OF_A_PART) * 1000)
        self._active.add_work(self._slot, milliseconds)
        return Place(milliseconds, count, ahead + audio, self._clock())

    def done(self, place: Place, measure: bool) -> None:
        """All of its audio is there, or it has ended otherwise. `measure`: the time that it took tells how
        long others will take. May be called twice."""
        if not place.in_work:
            return
        place.in_work = False
        self._active.add_work(self._slot, -place.milliseconds)
        if measure:
            self._rate.observe(place.count, place.audio, self._clock() - place.since)

    def leave(self, place: Place) -> None:
        """The request is over, its client has all it will get."""
        self.done(place, measure=False)
        self._active.remove(self._slot)

    def _check(self, count: int, ahead: float, audio: float, remaining: float) -> None:
        if count <= ALONE:
            return
        wait = self._rate.predict(count, ahead)
        if count > ALWAYS and wait > self._max_wait:
            reason = f"requests in work would keep it waiting for about {wait:.0f} s (--max_wait)"
            raise _busy("wait", reason, wait - self._max_wait)
        needed = self._rate.predict(count, ahead + audio)
        if needed > remaining:
            reason = f"it would take about {needed:.0f} s, and {remaining:.0f} s are left (--request_timeout)"
            raise _busy("deadline", reason, needed - remaining)


def _busy(reason: str, text: str, seconds: float) -> RequestError:
    retry_after = min(max(1, math.ceil(seconds)), LONGEST_RETRY)
    return RequestError(429, f"{text}; try again later", retry_after=retry_after, refusal=reason)
