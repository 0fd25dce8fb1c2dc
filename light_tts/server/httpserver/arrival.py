"""Arrival: a request from its first byte until the stages are set to work on it, or until it is refused."""

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
from light_tts.server.httpserver.admission import Place
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.record import RequestRecord


class Arrival:
    """Its id, its deadline and its place among the requests in work. Whoever opens it makes a SpeechCall of
    it, which owns it from then on, or ends it by `refuse` or `close`."""

    def __init__(self, manager: HttpServerManager, route: str) -> None:
        self.id = uuid.uuid4().hex[:16]
        self.manager = manager
        self.timeout = manager.settings.request_timeout
        self.record = RequestRecord(self.id, route)
        self._place: Place | None = None  # of a request that counts

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.timeout - self.record.age

    def admit(self, options: SpeechOptions, text: str = "") -> None:
        """Count it among the requests in work. Raises RequestError (429, 503)."""
        self._place = self.manager.admit(text, options, self.remaining)

    def end_work(self, typical: bool) -> None:
        """The stages have no more to do for it. `typical`: how long they took tells how long others will."""
        if self._place is not None:
            self.manager.admission.done(self._place, typical)

    def refuse(self, error: RequestError) -> None:
        """End it for this reason."""
        self.end(error.outcome, error)

    def close(self, outcome: str) -> None:
        """End it; `outcome` as the metrics name it."""
        self.end(outcome, None)

    def end(self, outcome: str, failure: RequestError | None) -> None:
        """Give its place back, count and log it. To be called once."""
        if self._place is not None:
            self.manager.admission.leave(self._place)
        self.record.write(outcome, failure, self.manager.sample_rate)


class OpenRequest(Protocol):
    """An Arrival or a SpeechCall."""

    def refuse(self, error: RequestError) -> None: ...

    def close(self, outcome: str) -> None: ...


@contextlib.contextmanager
def closed_on_error(held: OpenRequest) -> Iterator[None]:
    """Around what is done with a request while nobody else owns it: whatever is raised closes it with the
    outcome that it means."""
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
