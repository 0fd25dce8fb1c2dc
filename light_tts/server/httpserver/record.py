"""RequestRecord: the metrics and the final log line of one request."""

from __future__ import annotations

import logging
import time
from typing import Any

from light_tts.server.core import metrics
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.listener import Listener

HEALTH = "health"  # route of the server's own health checks

log = logging.getLogger("light_tts.http")


class RequestRecord:
    """Created when the request arrives; `write` must be called once, at its end."""

    def __init__(self, request_id: str, route: str) -> None:
        self.request_id = request_id
        self.arrived = time.monotonic()
        self.seed: int | None = None  # the seed reported to the client
        self._route = route
        self._first_audio: float | None = None  # seconds after the arrival
        self._samples_sent = 0
        self._listener = Listener()

    @property
    def age(self) -> float:
        """Seconds since the arrival."""
        return time.monotonic() - self.arrived

    def note_sent(self, pcm: bytes, sample_rate: int) -> None:
        """Record that this audio is being sent to the client."""
        if self._first_audio is None:
            self._first_audio = self.age
            metrics.time_to_first_audio_seconds.labels(self._route).observe(self._first_audio)
            log.debug("%s first audio", self.request_id)
        samples = len(pcm) // 2
        self._samples_sent += samples
        self._listener.hear(time.monotonic(), samples / sample_rate)

    def measure_pace(self, sample_rate: int, stream: bool) -> None:
        """Record the real-time factor and underruns; only for requests whose pace was set by the server and
        not by the client's text."""
        audio_seconds = self._samples_sent / sample_rate
        if not audio_seconds:
            return
        metrics.real_time_factor.labels(self._route).observe(self.age / audio_seconds)
        if stream:
            metrics.stream_underruns.labels(self._route).observe(self._listener.underruns)
            metrics.stream_buffer_seconds.labels(self._route).observe(self._listener.silence)

    def write(self, outcome: str, failure: RequestError | None, sample_rate: int) -> dict[str, Any]:
        """Count and log the request. `outcome`: value of the metrics' label. Returns the figures of the log
        line."""
        duration = self.age
        audio_seconds = self._samples_sent / sample_rate
        metrics.requests_total.labels(self._route, outcome).inc()
        metrics.audio_seconds_total.inc(audio_seconds)
        if outcome == "ok":
            metrics.request_duration_seconds.labels(self._route).observe(duration)
        figures: dict[str, Any] = {
            "route": self._route,
            "outcome": outcome,
            "seconds": round(duration, 4),
            "audio_seconds": round(audio_seconds, 2),
        }
        if self._first_audio is not None:
            figures["first_audio_seconds"] = round(self._first_audio, 4)
        if self.seed is not None:
            figures["seed"] = self.seed
        if failure is not None:
            figures["error"] = failure.message
        served = outcome == "ok" and self._route != HEALTH  # latencies are recorded for served requests only
        log.info(
            "%s route=%s outcome=%s audio=%.2fs ttfa=%sms%s%s %s %.0fms",
            self.request_id,
            self._route,
            outcome,
            audio_seconds,
            "-" if self._first_audio is None else f"{self._first_audio * 1000:.0f}",
            "" if self.seed is None else f" seed={self.seed}",
            "" if failure is None else f" error={failure.message!r}",
            "cost_time" if served else "after",
            duration * 1000,
            extra={"fields": figures},
        )
        return figures
