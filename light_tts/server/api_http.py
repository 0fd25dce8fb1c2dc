"""The FastAPI application, one per HTTP worker. Neither it nor its imports load torch."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from light_tts import __version__
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.core.styles import load_styles
from light_tts.server.httpserver import (
    page,
    routes_bistream,
    routes_cosyvoice,
    routes_speech,
    routes_status,
    routes_voices,
)
from light_tts.server.httpserver.access.guard import Guard
from light_tts.server.httpserver.access.keys import read_keys
from light_tts.server.httpserver.access.usage import KeyUsage
from light_tts.server.httpserver.elevenlabs import speech as elevenlabs_speech
from light_tts.server.httpserver.elevenlabs import stream as elevenlabs_stream
from light_tts.server.httpserver.elevenlabs import timestamps as elevenlabs_timestamps
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import describe
from light_tts.server.httpserver.health import HealthCheck
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openai import captions, listing, speech, stream, voices
from light_tts.server.httpserver.openai.names import Names
from light_tts.server.httpserver.openai.realtime import session as realtime
from light_tts.server.httpserver.prompts import PromptReader
from light_tts.server.httpserver.remote_recordings import RemoteRecordings
from light_tts.server.httpserver.tracing import TraceParent
from light_tts.server.httpserver.voices import VoiceStore

# Response headers that pages of other origins may read.
EXPOSED_HEADERS = ["X-Request-Id", "X-Sample-Rate", "X-Seed", "X-Ignored-Fields", "Retry-After"]


def create_app(settings: Settings, run_dir: RunDir) -> FastAPI:
    """Return the app. May be called before the worker is forked: sockets and tasks are created at the start
    of the lifespan."""
    styles = load_styles(settings.model_dir)
    keys = read_keys(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        manager = HttpServerManager(settings, run_dir, styles)
        await manager.start()
        app.state.manager = manager
        app.state.key_usage = KeyUsage(run_dir.shm, max(1, len(keys)), manager.slot)
        store = VoiceStore(settings.spk_dir)
        app.state.prompts = PromptReader(manager, store)
        app.state.names = Names(manager, store)
        app.state.remote_recordings = RemoteRecordings(settings)
        app.state.health = HealthCheck(manager)
        yield
        await manager.close()

    app = FastAPIOffline(
        title="Light-TTS",
        version=__version__,
        lifespan=lifespan,
        exception_handlers={
            RequestError: _answer_request_error,
            RequestValidationError: _answer_invalid_fields,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_defect,
        },
    )
    openai = (speech, captions, listing, voices, stream, realtime)
    surfaces = (*openai, elevenlabs_speech, elevenlabs_timestamps, elevenlabs_stream, routes_cosyvoice, page)
    for routes in (routes_speech, routes_bistream, routes_voices, routes_status, *surfaces):
        app.include_router(routes.router)
    app.state.settings = settings
    if settings.otlp_endpoint:
        app.add_middleware(TraceParent)
    app.add_middleware(Guard, settings=settings, keys=keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.strip() for origin in settings.cors_origins.split(",")],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    return app


def _headers(request: Request) -> dict[str, str]:
    request_id = getattr(request.state, "request_id", None)
    return {} if request_id is None else {"X-Request-Id": request_id}


async def _answer_request_error(request: Request, error: RequestError) -> JSONResponse:
    return JSONResponse({"message": error.message}, error.status, {**_headers(request), **error.headers})


async def _answer_invalid_fields(request: Request, error: RequestValidationError) -> JSONResponse:
    """Return FastAPI's `detail` and a one-line version of it."""
    detail = [{"type": e["type"], "loc": list(e["loc"]), "msg": e["msg"]} for e in error.errors()]
    return JSONResponse({"message": describe(error), "detail": detail}, 422, _headers(request))


async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    headers = {**_headers(request), **(error.headers or {})}
    return JSONResponse({"message": error.detail}, error.status_code, headers)


async def _answer_nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)


async def _answer_defect(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"message": "internal error"}, 500, _headers(request))
