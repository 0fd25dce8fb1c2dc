"""The fields of requests and how they are read from a body: multipart form, URL-encoded form or JSON."""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import from_json
from starlette.datastructures import UploadFile

from light_tts.common.sampling_rule import MAX_TOP_K, MAX_WIN_SIZE
from light_tts.common.speakable import can_become_speakable
from light_tts.server.core.messages import SpeechOptions
from light_tts.server.httpserver.errors import RequestError

MAX_FORM_FIELDS = 64
MAX_PROMPT_TEXT = 2000  # characters; far above what can be said in 30 s
MAX_SEED = 2**32 - 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 2.0
MAX_TAU_R = 2.0
MAX_TOKENS = 2**20  # of numbers in a request; what a request may use is max_req_total_len

Fields = TypeVar("Fields", bound="BodyFields")


def _decode_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # line breaks are common
    except (binascii.Error, ValueError):
        raise ValueError("is not valid base64") from None


# A file part of a form arrives as bytes, JSON as base64 text.
Recording = Annotated[
    bytes,
    BeforeValidator(_decode_base64),
    Field(description="recording of the voice: file in a form, base64 in JSON"),
]


class BodyFields(BaseModel):
    """Empty values of optional numbers and choices (a form field left blank) mean "not given"."""

    @model_validator(mode="before")
    @classmethod
    def _drop_blanks(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        blank_counts = {"tts_text", "prompt_text"}
        return {name: value for name, value in values.items() if value != "" or name in blank_counts}


class VoiceChoice(BodyFields):
    """The voice and the LLM weights to speak with, and how tokens are drawn. Fields that are named as in
    `SpeechOptions` go there."""

    prompt_text: str | None = Field(None, description="what is said in prompt_wav")
    prompt_wav: Recording | None = None
    spk_id: str | None = Field(None, description="a voice of /spk_list instead of prompt_wav")
    tts_model_name: str = Field("default", description="a style of /query_tts_model")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="same seed, same audio; default: random")
    min_new_tokens: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="least speech tokens of a part (25 a second)"
    )
    max_new_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="most speech tokens of a part")
    top_p: float | None = Field(
        None, gt=0, le=1, description="draw from the most probable tokens with this share of the probability"
    )
    top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="and from no more tokens than this")
    temperature: float | None = Field(
        None, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, description="below 1: more even; above 1: more varied"
    )
    win_size: int | None = Field(
        None, ge=1, le=MAX_WIN_SIZE, description="latest tokens in which a token counts as repeated"
    )
    tau_r: float | None = Field(
        None,
        gt=0,
        le=MAX_TAU_R,
        description="a token that fills this share of win_size is drawn again; above 1: never",
    )


class SpeechFields(VoiceChoice):
    """POST /inference_zero_shot"""

    tts_text: str = Field(description="what to say")
    stream: bool = Field(False, description="send audio as it is made")
    speed: float = Field(1.0, ge=0.5, le=2.0, allow_inf_nan=False)
    format: Literal["pcm", "wav"] = "pcm"


def speech_options(fields: VoiceChoice, longest: int) -> SpeechOptions:
    """What was asked for, with a random seed where none was. `longest`: most tokens of a part.
    Raises RequestError (400)."""
    least, most = fields.min_new_tokens, fields.max_new_tokens
    if least is not None and most is not None and least > most:
        raise RequestError(400, f"min_new_tokens {least} is above max_new_tokens {most}")
    for name in ("min_new_tokens", "max_new_tokens"):
        asked = getattr(fields, name)
        if asked is not None and asked > longest:
            raise RequestError(
                400, f"{name} {asked} is above the {longest} speech tokens of one part (--max_part_tokens)"
            )
    given = {name: getattr(fields, name, None) for name in SpeechOptions.__struct_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    return SpeechOptions(**{"seed": secrets.randbelow(MAX_SEED + 1), **given})


class NewVoiceFields(BodyFields):
    """POST /add_spk"""

    spk_id: str
    prompt_text: str
    prompt_wav: Recording


def missing(name: str) -> RequestValidationError:
    """FastAPI's error for a field that is not there."""
    return RequestValidationError([{"type": "missing", "loc": ("body", name), "msg": "Field required"}])


def describe(error: RequestValidationError) -> str:
    """All that is wrong with the fields, in one line."""
    return "; ".join(f"{'.'.join(map(str, entry['loc'][1:]))}: {entry['msg']}" for entry in error.errors())


def parse(model: type[Fields], values: Any) -> Fields:
    """Raises RequestValidationError (422)."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        for entry in errors:
            entry["loc"] = ("body", *entry["loc"])
        raise RequestValidationError(errors) from None


def parse_json(data: bytes | bytearray | str) -> Any:
    """Raises RequestError (400)."""
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"malformed JSON: {error}") from None


async def read_body(request: Request, model: type[Fields]) -> Fields:
    """The fields of a request. Raises RequestError, RequestValidationError, HTTPException or
    ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        values = parse_json(await _whole_body(request))
        if not isinstance(values, dict):
            raise RequestError(400, "a JSON object was expected")
        return parse(model, values)
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise RequestError(415, "the body must be multipart/form-data or application/json")
    async with request.form(max_files=4, max_fields=MAX_FORM_FIELDS) as form:
        values = {}
        for name, value in form.items():
            is_recording = name == "prompt_wav"
            if is_recording != isinstance(value, UploadFile):
                kind = "a file" if is_recording else "text"
                raise RequestValidationError(
                    [{"type": "value_error", "loc": ("body", name), "msg": f"Value should be {kind}"}]
                )
            values[name] = await value.read() if is_recording else value
        return parse(model, values)


async def _whole_body(request: Request) -> bytearray:
    """Unlike request.body(), it is not kept until the answer has been sent, nor by the traceback of a client
    that goes away. Raises ClientDisconnect."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
    except BaseException:
        body.clear()
        raise
    return body


def check_text(name: str, text: str, limit: int, may_be_empty: bool = False) -> str:
    """`text` as it was given. Raises RequestError (400) where it cannot be spoken."""
    if len(text) > limit:
        raise RequestError(400, f"{name} has {len(text)} characters; at most {limit} are allowed")
    if "\0" in text:
        raise RequestError(400, f"{name} contains a null character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(400, f"{name} is not valid Unicode (lone surrogate)") from None
    if not may_be_empty and not text.strip():
        raise RequestError(400, f"{name} is empty")
    if not may_be_empty and not can_become_speakable(text):
        raise RequestError(
            400,
            f"there is nothing to speak in {name}, only punctuation and symbols: it needs letters or digits",
        )
    return text
