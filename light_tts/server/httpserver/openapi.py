"""OpenAPI descriptions of bodies that are read with `read_body`, and of errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

ERRORS = {
    400: "a value or the audio is wrong, or the body is malformed; the message names the field",
    401: "the server has API keys, and none of them came with the request",
    404: "there is no model or voice of this name",
    408: "the body, or a recording that it names by its address, did not come in time",
    409: "the voice belongs to the checkpoint and cannot be changed",
    413: "the body is above `--max_upload_mb`",
    415: "the body is neither a form nor JSON",
    422: "a field is missing, unknown or of the wrong kind (native and CosyVoice's routes; elsewhere 400)",
    429: "the server, or what a key may use of it, is full: try again after `Retry-After` seconds",
    500: "a stage failed at this request",
    503: "the server is ending, or cannot speak at the moment",
    504: "it took longer than `--request_timeout`",
}
_OF_A_BODY = (400, 401, 408, 413, 415, 422, 429)
_OF_SPEECH = (*_OF_A_BODY, 500, 503, 504)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route with these error statuses, and 401 and 429, which any route has."""
    return {status: {"description": ERRORS[status]} for status in sorted({401, 429, *statuses})}


def body_of(model: type[BaseModel], speaks: bool = True, more: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the `openapi_extra` of a route whose body is `model` as a form or JSON. `speaks`: the route
    returns speech; `more`: further error statuses."""
    schema = model.model_json_schema()
    kinds = ("multipart/form-data", "application/json")
    statuses = sorted({*(_OF_SPEECH if speaks else _OF_A_BODY), *more})
    return {
        "requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}},
        "responses": {str(status): {"description": ERRORS[status]} for status in statuses},
    }
