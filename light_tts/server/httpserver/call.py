"""SpeechCall: a route's handle on one request, from its arrival to its last byte."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from light_tts.server.core import messages, metrics
from light_tts.server.httpserver.admission import Place
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.listener import Listener
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.request import Speech, SpeechRequest

HEALTH = "health"  # route of the server's own health checks

log = logging.getLogger("light_tts.http")


class SpeechCall:
    """One client request as seen by a route. Created when the request arrives; `close` must be called at
    least once and records the outcome.

    `admit` counts it as active and `submit` sends it to the stages. Iterating yields PCM in order and ends
    after the last sample, or raises RequestError.
    """

    def __init__(self, manager: HttpServerManager, route: str) -> None:
        self.id = uuid.uuid4().hex[:16]
        self._request: SpeechRequest | None = None
        self._manager = manager
        self._route = route
        self._arrived = time.monotonic()
        self._timeout = manager.settings.request_timeout
        self._deadline: asyncio.TimerHandle | None = None
        self._place: Place | None = None
        self._audio: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._first_audio: float | None = None
        self._listener = Listener()
        self._samples_sent = 0
        self._closed = False
        self._seed: int | None = None  # the seed reported to the client
        self.failure: RequestError | None = None

    @property
    def request(self) -> SpeechRequest:
        """The submitted request. Raises RuntimeError before `submit`."""
        if self._request is None:
            raise RuntimeError("the call has not been submitted")
        return self._request

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self._arrived + self._timeout - time.monotonic()

    @property
    def sample_rate(self) -> int:
        """Sample rate of the PCM in Hz."""
        return self._manager.sample_rate

    def admit(self, options: messages.SpeechOptions, text: str = "") -> None:
        """Count the request as active. Raises RequestError (429, 503)."""
        self._place = self._manager.admit(text, options, self.remaining)

    def submit(self, speech: Speech) -> None:
        """Send the request to the stages. The deadline counts from its arrival. Raises RequestError (503)."""
        log.debug("%s read after %.1f ms", self.id, (time.monotonic() - self._arrived) * 1000)
        self._request = SpeechRequest(self.id, speech)
        self._seed = speech.options.seed
        self._manager.submit(self)
        self._deadline = asyncio.get_running_loop().call_later(max(0.0, self.remaining), self._expire)

    def append_text(self, text: str) -> None:
        """Add the next piece of text of a bistream request."""
        self.request.texts.append(text)
        self._manager.append(self.request, messages.AppendText(job=self.request.job, text=text))

    def finish_text(self) -> None:
        self.request.text_finished = True
        self._manager.append(self.request, messages.FinishText(job=self.request.job))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._audio:
                yield self._audio.popleft()
            if self.failure is not None:
                raise self.failure
            if self.request.complete:
                return
            self._changed.clear()
            await self._changed.wait()

    def note_sent(self, pcm: bytes) -> None:
        """Record that this audio is being sent to the client."""
        if self._first_audio is None:
            self._first_audio = time.monotonic() - self._arrived
            metrics.time_to_first_audio_seconds.labels(self._route).observe(self._first_audio)
            log.debug("%s first audio", self.id)
        samples = len(pcm) // 2
        self._samples_sent += samples
        self._listener.hear(time.monotonic(), samples / self._manager.sample_rate)

    # -- called by the manager

    def deliver(self, audio: list[bytes]) -> None:
        """Called with more PCM, and when all audio has arrived."""
        self._audio.extend(audio)
        self._changed.set()
        if self.request.complete:
            self._end_work(measure=True)

    def fail(self, error: RequestError) -> None:
        """End with an error: the stages drop the request, and audio not sent yet is discarded."""
        if self.failure is None:
            self.failure = error
            self._audio.clear()
            self._changed.set()
            self._manager.forget(self)

    def _end_work(self, measure: bool) -> None:
        """Record that the stages have finished. `measure`: whether the duration is representative."""
        if self._place is not None:
            typical = measure and not self.request.speech.bistream and self.request.attempt == 0
            self._manager.admission.done(self._place, typical)

    def _expire(self) -> None:
        self._end_work(measure=True)
        self.fail(RequestError(504, f"the request took longer than {self._timeout:g} s"))

    # -- the end

    def refuse(self, error: RequestError) -> None:
        """Close with the outcome of this error."""
        self.failure = self.failure or error
        self.close()

    def close(self, outcome: str | None = None) -> None:
        """Free all resources; count and log the request. `outcome` None: that of the failure, or "ok"."""
        if self._closed:
            return
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        if self._request is not None:
            self._manager.forget(self)
        if self._place is not None:
            self._manager.admission.leave(self._place)
        if outcome is None:
            outcome = "ok" if self.failure is None else self.failure.outcome
        duration = time.monotonic() - self._arrived
        audio_seconds = self._samples_sent / self._manager.sample_rate
        metrics.requests_total.labels(self._route, outcome).inc()
        metrics.audio_seconds_total.inc(audio_seconds)
        if outcome == "ok":
            metrics.request_duration_seconds.labels(self._route).observe(duration)
            self._measure_pace(duration, audio_seconds)
        ttfa = "-" if self._first_audio is None else f"{self._first_audio * 1000:.0f}"
        served = outcome == "ok" and self._route != HEALTH  # latencies are recorded for served requests only
        log.info(
            "%s route=%s outcome=%s audio=%.2fs ttfa=%sms%s%s %s %.0fms",
            self.id,
            self._route,
            outcome,
            audio_seconds,
            ttfa,
            "" if self._seed is None else f" seed={self._seed}",
            f" error={self.failure.message!r}" if self.failure is not None else "",
            "cost_time" if served else "after",
            duration * 1000,
            extra={"fields": self._figures(outcome, duration, audio_seconds)},
        )

    def _figures(self, outcome: str, duration: float, audio_seconds: float) -> dict[str, Any]:
        """Return the values of the request's final log line as structured data."""
        figures = {
            "route": self._route,
            "outcome": outcome,
            "seconds": round(duration, 4),
            "audio_seconds": round(audio_seconds, 2),
        }
        if self._first_audio is not None:
            figures["first_audio_seconds"] = round(self._first_audio, 4)
        if self._seed is not None:
            figures["seed"] = self._seed
        if self.failure is not None:
            figures["error"] = self.failure.message
        return figures

    def _measure_pace(self, duration: float, audio_seconds: float) -> None:
        """Record the real-time factor and underruns, only if the pace was set by the server and not by the
        client's text."""
        speech = self.request.speech
        if speech.bistream or not audio_seconds:
            return
        metrics.real_time_factor.labels(self._route).observe(duration / audio_seconds)
        if speech.stream:
            metrics.stream_underruns.labels(self._route).observe(self._listener.underruns)
            metrics.stream_buffer_seconds.labels(self._route).observe(self._listener.silence)
