"""Arrival: a request from its arrival until it is submitted to the stages or refused."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Protocol

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

from light_tts.server.core.messages import SpeechOptions
from light_tts.server.httpserver.admission import AdmittedRequest
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.record import HEALTH, RequestRecord
from light_tts.server.httpserver.request import SpeechRequest
from light_tts.server.httpserver.tracing import trace_headers


class Arrival:
    """Id, deadline and admission of a request. Its creator must either turn it into a SpeechCall, which owns
    it from then on, or end it by `refuse` or `close`."""

    def __init__(self, manager: HttpServerManager, route: str) -> None:
        self.id = uuid.uuid4().hex[:16]
        self.manager = manager
        self.timeout = manager.settings.request_timeout
        self.record = RequestRecord(self.id, route)
        self._admitted: AdmittedRequest | None = None  # None unless admitted
        self._trace_headers = trace_headers()

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.timeout - self.record.age

    def admit(self, options: SpeechOptions, text: str = "", *, stream: bool) -> None:
        """Count the request as active. Raises RequestError (429, 503)."""
        self._admitted = self.manager.admit(text, options, self.remaining, stream)

    def end_work(self, typical: bool) -> None:
        """Record that the stages have finished. `typical`: whether the duration is representative."""
        if self._admitted is not None:
            self.manager.admission.done(self._admitted, typical)

    def refuse(self, error: RequestError) -> None:
        """End it with this error."""
        self.end(error.outcome, error)

    def close(self, outcome: str) -> None:
        """End it with an outcome, as the metrics name it."""
        self.end(outcome, None)

    def end(self, outcome: str, failure: RequestError | None, request: SpeechRequest | None = None) -> None:
        """End its admission; count, log and trace it. `request`: what was submitted. To be called once."""
        if self._admitted is not None:
            self.manager.admission.leave(self._admitted)
        record, tracing = self.record, self.manager.tracing
        figures = record.write(outcome, failure, self.manager.sample_rate)
        if tracing is not None and figures["route"] != HEALTH:
            tracing.record(self._trace_headers, self.id, record.arrived, figures, request)


class OpenRequest(Protocol):
    """An Arrival or a SpeechCall."""

    def refuse(self, error: RequestError) -> None: ...

    def close(self, outcome: str) -> None: ...


@contextlib.contextmanager
def closed_on_error(held: OpenRequest) -> Iterator[None]:
    """Context manager for the time while the caller owns the request: any exception closes it with the
    corresponding outcome."""
    try:
        yield
    except (ClientDisconnect, WebSocketDisconnect):
        held.close("disconnected")
        raise
    except RequestError as error:
        held.refuse(error)
        raise
    except (HTTPException, RequestValidationError):
        held.close("rejected")
        raise
    except BaseException:
        held.close("failed")
        raise
