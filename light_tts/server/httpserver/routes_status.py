"""Routes for operators and load balancers: liveness, readiness, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from light_tts.server.core import metrics
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openapi import ERRORS

NOT_NOW: dict[int | str, dict[str, Any]] = {503: {"description": ERRORS[503]}}

router = APIRouter()


@router.get("/liveness")
async def liveness() -> dict[str, str]:
    """This worker responds."""
    return {"status": "ok"}


@router.get("/readiness", responses=NOT_NOW)
async def readiness(request: Request) -> JSONResponse:
    """200, or 503 while a stage is not up or the server is shutting down; the body says which."""
    manager: HttpServerManager = request.app.state.manager
    stages = [
        {"stage": info.stage, "index": info.index, "state": info.state, "reason": info.reason}
        for _, info in sorted(manager.peers.stages.items())
    ]
    ready = bool(stages) and not manager.draining and all(stage["state"] == "up" for stage in stages)
    body = {"status": "ok" if ready else "unavailable", "draining": manager.draining, "stages": stages}
    return JSONResponse(body, 200 if ready else 503)


@router.get("/health", responses=NOT_NOW)
@router.get("/healthz", responses=NOT_NOW)
async def health(request: Request) -> JSONResponse:
    """Synthesize through every decode process; 503 with the probable causes if one fails."""
    result = await request.app.state.health.result()
    if result.ok:
        return JSONResponse({"message": result.message})
    return JSONResponse({"message": result.message, "stages": result.stages}, 503)


@router.get("/metrics")
async def prometheus() -> Response:
    """Metrics of all processes, for Prometheus."""
    text, content_type = await asyncio.to_thread(metrics.render)
    return Response(text, headers={"Content-Type": content_type})
