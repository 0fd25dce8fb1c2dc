"""SpeechCall: a route's handle on one submitted request, up to its last byte."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec

from light_tts.server.core import messages
from light_tts.server.httpserver.arrival import Arrival
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.request import SpeechRequest, WantedSpeech

log = logging.getLogger("light_tts.http")


class SpeechCall:
    """One submitted request as seen by a route. `close` must be called at least once and records the outcome.
    Iterating yields PCM in order and ends after the last sample, or raises RequestError."""

    def __init__(self, arrival: Arrival, speech: WantedSpeech) -> None:
        """Submits the request. The deadline counts from its arrival. Raises RequestError (503); the arrival
        remains the caller's then."""
        log.debug("%s read after %.1f ms", arrival.id, arrival.record.age * 1000)
        arrival.record.seed = speech.options.seed
        if arrival.manager.tracing is not None:
            speech = replace(speech, options=msgspec.structs.replace(speech.options, traced=True))
        self.id = arrival.id
        self.request = SpeechRequest(arrival.id, speech)
        self.failure: RequestError | None = None
        self._arrival = arrival
        self._submissions = arrival.manager.submissions
        self._audio: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._submissions.submit(self)
        self._deadline = asyncio.get_running_loop().call_later(max(0.0, self.remaining), self._expire)

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self._arrival.remaining

    @property
    def sample_rate(self) -> int:
        """Sample rate of the PCM in Hz."""
        return self._arrival.manager.sample_rate

    def append_text(self, text: str) -> None:
        """Add the next piece of text of a bistream request."""
        self.request.texts.append(text)
        self._submissions.append(self.request, messages.AppendText(job=self.request.job, text=text))

    def finish_text(self) -> None:
        self.request.text_finished = True
        self._submissions.append(self.request, messages.FinishText(job=self.request.job))

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
        self._arrival.record.note_sent(pcm, self.sample_rate)

    # -- called by Submissions

    def deliver(self, audio: list[bytes]) -> None:
        """Called with more PCM, and when all audio has arrived."""
        self._audio.extend(audio)
        self._changed.set()
        if self.request.complete:
            self._end_work()

    def fail(self, error: RequestError) -> None:
        """End with an error: audio not sent yet is discarded."""
        if self.failure is None:
            self.failure = error
            self._audio.clear()
            self._changed.set()

    def _end_work(self) -> None:
        self._arrival.end_work(typical=not self.request.speech.bistream and self.request.attempt == 0)

    def _expire(self) -> None:
        self._end_work()
        self.give_up(RequestError(504, f"the request took longer than {self._arrival.timeout:g} s"))

    # -- the end

    def give_up(self, error: RequestError) -> None:
        """End with an error before all audio has arrived: the stages drop the request."""
        self._submissions.forget(self.request)
        self.fail(error)

    def refuse(self, error: RequestError) -> None:
        """Close with the outcome of this error."""
        self.failure = self.failure or error
        self.close()

    def close(self, outcome: str | None = None) -> None:
        """Free all resources; count and log the request. `outcome` None: that of the failure, or "ok"."""
        if self._closed:
            return
        self._closed = True
        self._deadline.cancel()
        self._submissions.forget(self.request)
        if outcome is None:
            outcome = "ok" if self.failure is None else self.failure.outcome
        speech = self.request.speech
        if outcome == "ok" and not speech.bistream:
            self._arrival.record.measure_pace(self.sample_rate, speech.stream)
        self._arrival.end(outcome, self.failure, self.request)
