"""Shared by the HTTP APIs: how requests arrive and how errors are reported."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

from light_tts.server.httpserver.arrival import Arrival
from light_tts.server.httpserver.audio_response import Explain
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import Body, describe, read_body
from light_tts.server.httpserver.json_socket import JsonSocket
from light_tts.server.httpserver.request import WantedSpeech


class HttpArrival(Arrival):
    """Arrival of an HTTP request, whose body has not been read."""

    def __init__(self, request: Request, route: str) -> None:
        super().__init__(request.app.state.manager, route)
        self.manager.expect_request()
        self._request = request
        request.state.request_id = self.id

    async def fields(self, model: type[Body]) -> Body:
        """Read the body within the deadline. Raises RequestError, RequestValidationError, HTTPException or
        ClientDisconnect."""
        try:
            return await asyncio.wait_for(read_body(self._request, model), self.remaining)
        except asyncio.TimeoutError:
            raise RequestError(408, "the request's body did not arrive in time") from None

    def submit(self, speech: WantedSpeech) -> SpeechCall:
        """Submit to the stages; the upload no longer counts as in flight. Raises RequestError (503)."""
        self._request.state.upload.release()
        return SpeechCall(self, speech)


@contextlib.asynccontextmanager
async def explained(
    socket: JsonSocket, explain: Callable[[RequestError], Awaitable[None]]
) -> AsyncIterator[None]:
    """Context manager around the conversation on a WebSocket: an error is sent by `explain` and closes the
    connection with code 1008; a disconnect of the client just ends it."""
    try:
        yield
    except WebSocketDisconnect:
        pass
    except (RequestError, RequestValidationError) as error:
        refusal = as_request_error(error)
        with contextlib.suppress(WebSocketDisconnect):
            await explain(refusal)
        await socket.close(1008, refusal.message)


class DirectRoute(APIRoute):
    """A route that calls its endpoint without FastAPI's preparation, if that takes only the request and
    returns a Response: it reads the body itself."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if get_type_hints(self.endpoint) == {"request": Request, "return": Response}:
            return self.endpoint
        return super().get_route_handler()


def route_class(explain: Explain) -> type[APIRoute]:
    """Return a route class whose errors are answered by `explain`."""

    class SurfaceRoute(DirectRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_and_explain(request: Request) -> Response:
                try:
                    return await handle(request)
                except ClientDisconnect:
                    return Response(status_code=400)
                except (RequestError, RequestValidationError, HTTPException) as error:
                    request_id = getattr(request.state, "request_id", None)
                    headers = {} if request_id is None else {"X-Request-Id": request_id}
                    refusal = as_request_error(error)
                    return explain(refusal, {**headers, **refusal.headers})

            return handle_and_explain

    return SurfaceRoute


def as_request_error(error: RequestError | RequestValidationError | HTTPException) -> RequestError:
    """Convert to a RequestError. Invalid fields become 400, as in the original services."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(error.status_code, str(error.detail))
    first = error.errors()[0]["loc"]
    return RequestError(400, describe(error), field=str(first[1])[:64] if len(first) > 1 else None)
