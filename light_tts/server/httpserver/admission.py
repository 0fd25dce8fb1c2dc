"""Admission control: accepts a request only if it is expected to be served in time.

The outstanding work of all HTTP workers is counted in seconds of audio, estimated from the texts. The time it
takes is measured with every finished request. Systematic errors of the estimate cancel out, because the
measurement uses the same unit. A long text counts with one part at most, since other requests run between its
parts.

A request waits for all outstanding audio. But as many streams as can be played at a time are accepted,
however long they are: each needs its audio only as fast as it is played.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from light_tts.server.core import metrics
from light_tts.server.core.counters import ActiveRequests, ServiceRate
from light_tts.server.core.messages import SpeechOptions
from light_tts.server.core.settings import Settings
from light_tts.server.httpserver.errors import RequestError

# Up to this many active requests are accepted regardless of the expected wait, if the deadline allows.
ALWAYS = 16
# Up to this many are accepted even if the deadline seems too short, so that there is always a measurement.
ALONE = 2

LATIN_PER_SECOND, CJK_PER_SECOND = 15.0, 4.5  # speaking rate in characters per second
FIRST_CJK = "\u2e80"
TOKENS_PER_SECOND = 25
# approximate length of the parts that texts are split into; other requests run between parts
SECONDS_OF_A_PART = 20.0
LEAST_AUDIO = 2.0  # seconds; accounts for the fixed cost of a request
UNKNOWN_AUDIO = 10.0  # seconds, assumed for text that has not arrived yet
LONGEST_RETRY = 60  # seconds


def expected_audio(text: str, options: SpeechOptions) -> float:
    """Return the estimated length of the audio for `text` in seconds. Empty `text`: not known yet."""
    cjk = sum(character >= FIRST_CJK for character in text)
    spoken = (len(text) - cjk) / LATIN_PER_SECOND + cjk / CJK_PER_SECOND if text else UNKNOWN_AUDIO
    parts = max(1.0, spoken / SECONDS_OF_A_PART)
    if options.max_new_tokens is not None:
        spoken = min(spoken, parts * options.max_new_tokens / TOKENS_PER_SECOND)
    if options.min_new_tokens is not None:
        spoken = max(spoken, parts * options.min_new_tokens / TOKENS_PER_SECOND)
    return max(spoken, LEAST_AUDIO)


@dataclass
class AdmittedRequest:
    """An accepted request. `milliseconds`: its audio that others wait for; `count`, `audio` (seconds): the
    active requests and their outstanding audio when it was accepted, itself included."""

    milliseconds: int
    count: int
    audio: float
    since: float
    in_work: bool = True


class Admission:
    """Admission control of one HTTP worker, whose slot in the shared counters is `slot`."""

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

    def admit(self, audio: float, remaining: float, stream: bool) -> AdmittedRequest:
        """Count one more active request with `audio` seconds of audio and `remaining` seconds to its
        deadline; `leave` undoes it. Raises RequestError (429)."""
        if not self._active.try_add(self._slot, self._limit):
            raise _busy("pending", f"{self._limit} requests are already active", 1)
        count, ahead = self._active.total(), self._active.work() / 1000
        try:
            self._check(count, ahead, audio, remaining, stream)
        except RequestError:
            self._active.remove(self._slot)
            raise
        milliseconds = round(min(audio, SECONDS_OF_A_PART) * 1000)
        self._add_work(milliseconds)
        return AdmittedRequest(milliseconds, count, ahead + audio, self._clock())

    def done(self, admitted: AdmittedRequest, measure: bool) -> None:
        """The stages have finished the request. `measure`: whether its duration is representative and should
        update the service rate. May be called twice."""
        if not admitted.in_work:
            return
        admitted.in_work = False
        self._add_work(-admitted.milliseconds)
        if measure:
            self._rate.observe(admitted.count, admitted.audio, self._clock() - admitted.since)

    def leave(self, admitted: AdmittedRequest) -> None:
        """The request is over and its client has been served."""
        self.done(admitted, measure=False)
        self._active.remove(self._slot)

    def _add_work(self, milliseconds: int) -> None:
        self._active.add_work(self._slot, milliseconds)
        metrics.audio_seconds_in_work.inc(milliseconds / 1000)

    def _check(self, count: int, ahead: float, audio: float, remaining: float, stream: bool) -> None:
        if count <= ALONE:
            return
        wait = self._rate.predict(count, ahead)
        if stream and count * wait <= ahead:  # `count` seconds of audio take at most a second
            wait = 0.0
        if count > ALWAYS and wait > self._max_wait:
            reason = f"active requests would delay this one by about {wait:.0f} s (--max_wait)"
            raise _busy("wait", reason, wait - self._max_wait)
        needed = self._rate.predict(count, ahead + audio)
        if needed > remaining:
            reason = (
                f"it would take about {needed:.0f} s, but only {remaining:.0f} s are left (--request_timeout)"
            )
            raise _busy("deadline", reason, needed - remaining)


def _busy(reason: str, text: str, seconds: float) -> RequestError:
    retry_after = min(max(1, math.ceil(seconds)), LONGEST_RETRY)
    return RequestError(429, f"{text}; try again later", retry_after=retry_after, refusal=reason)
