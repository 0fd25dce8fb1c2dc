"""GET /v1/models, /v1/audio/models, /v1/models/{id}, /v1/test"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import State

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.openai.errors import explain
from light_tts.server.httpserver.openapi import errors
from light_tts.server.httpserver.surface import route_class

router = APIRouter(route_class=route_class(explain))


def _model(state: State, name: str) -> dict[str, Any]:
    """A model of OpenAI's list, and whether it can report word times."""
    word_times = state.manager.knows_word_times(state.names.style(name))
    entry = {"id": name, "object": "model", "created": 0, "owned_by": "light-tts"}
    return {**entry, "word_timestamps": word_times}


@router.get("/v1/models", responses=errors())
@router.get("/v1/audio/models", responses=errors())
async def models(request: Request) -> dict[str, Any]:
    """List the models; `models` repeats `data` for clients that read that key."""
    state = request.app.state
    listed = [_model(state, name) for name in state.names.models]
    return {"object": "list", "data": listed, "models": listed}


@router.get("/v1/models/{model}", responses=errors(404))
async def model(request: Request, model: str) -> dict[str, Any]:
    """One of them."""
    if model not in request.app.state.names.models:
        raise RequestError(404, f"the model {model[:64]!r} does not exist", field="model")
    return _model(request.app.state, model)


@router.get("/v1/test", responses=errors())
async def test() -> dict[str, str]:
    """Liveness check used by wyoming-openai."""
    return {"status": "ok"}
