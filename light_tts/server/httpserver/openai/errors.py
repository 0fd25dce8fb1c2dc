"""Errors in OpenAI's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from light_tts.server.httpserver.errors import RequestError

_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


def error_body(error: RequestError) -> dict[str, Any]:
    """Return `{"error": ...}`."""
    kind = "invalid_request_error"
    if error.status >= 500:
        kind = "server_error"
    elif error.status == 429:
        kind = "rate_limit_error"
    code = _CODES.get(error.status)
    if error.status == 404 and error.field is not None:
        code = f"{error.field}_not_found"
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": code}}


def explain(error: RequestError, headers: Mapping[str, str]) -> Response:
    return JSONResponse(error_body(error), error.status, headers)
