"""Describes bodies that are read by `read_body` in the OpenAPI page."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is `model` as a form or as JSON."""
    schema = model.model_json_schema()
    kinds = ("multipart/form-data", "application/json")
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}
