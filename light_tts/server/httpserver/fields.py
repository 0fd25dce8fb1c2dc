"""Request fields and how they are read from a body: multipart form, URL-encoded form or JSON."""

from __future__ import annotations

import base64
import binascii
import difflib
import secrets
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.types import Message

from light_tts.common.sampling_rule import MAX_TOP_K, MAX_WIN_SIZE
from light_tts.common.speakable import can_become_speakable
from light_tts.server.core.messages import SpeechOptions
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.plain_form import plain_form

MAX_FORM_FIELDS = 64
MAX_FORM_FILES = 4
MAX_PLAIN_FORM = 2**20  # bytes of a form that is parsed at once; a longer one is spooled to disk meanwhile
MAX_PROMPT_TEXT = 2000  # characters; far more than fit in 30 s of speech
MAX_SEED = 2**32 - 1
MAX_SHOWN = 64  # maximum number of client-sent characters repeated in an error message
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 2.0
MAX_TAU_R = 2.0
MAX_TOKENS = 2**20  # upper bound of token counts in a request; max_req_total_len is the effective limit

Fields = TypeVar("Fields", bound=BaseModel)
Body = TypeVar("Body", bound="BodyFields")


def decode_base64(value: Any) -> Any:
    """Return the bytes of base64 text or of a data: URL; other types are returned unchanged. Raises
    ValueError."""
    if not isinstance(value, str):
        return value
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # line breaks are common in base64
    except (binascii.Error, ValueError):
        raise ValueError("is not valid base64") from None


# A file field of a form arrives as bytes, a JSON field as base64 text.
Recording = Annotated[
    bytes,
    BeforeValidator(decode_base64),
    Field(description="recording of the voice: a file in a form, base64 in JSON"),
]


class BodyFields(BaseModel):
    """Base class of request bodies. Empty values of optional numbers and choices (a form field left blank)
    mean "not given"; an unknown field is an error.

    `elsewhere`: fields that exist but are not supported here, with a hint what to do; `recordings`: fields
    that are files in a form.
    """

    model_config = ConfigDict(extra="forbid")
    elsewhere: ClassVar[dict[str, str]] = {}
    recordings: ClassVar[frozenset[str]] = frozenset({"prompt_wav"})

    @model_validator(mode="before")
    @classmethod
    def _drop_blanks(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        blank_counts = {"tts_text", "prompt_text", "input"}
        may_be_blank = cls.model_fields.keys() - blank_counts
        return {name: value for name, value in values.items() if value != "" or name not in may_be_blank}

    @classmethod
    def why_unknown(cls, name: str) -> str:
        """Return the error message for a field that this body does not have."""
        if name in cls.elsewhere:
            return cls.elsewhere[name]
        known = list(cls.model_fields)
        near = difflib.get_close_matches(name[:MAX_SHOWN], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return f"unknown field; {hint}"


class Drawing(BodyFields):
    """Sampling parameters. Fields that share a name with `SpeechOptions` are copied there."""

    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="the same seed gives the same audio; default: random"
    )
    min_new_tokens: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="minimum number of speech tokens per part (25 per second)"
    )
    max_new_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="maximum number of speech tokens per part"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample from the most probable tokens up to this cumulative probability"
    )
    top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="and from at most this many tokens")
    temperature: float | None = Field(
        None,
        ge=MIN_TEMPERATURE,
        le=MAX_TEMPERATURE,
        description="below 1: more uniform; above 1: more varied",
    )
    win_size: int | None = Field(
        None,
        ge=1,
        le=MAX_WIN_SIZE,
        description="number of most recent tokens in which repetitions are counted",
    )
    tau_r: float | None = Field(
        None,
        gt=0,
        le=MAX_TAU_R,
        description="a token that makes up this share of win_size is resampled; above 1: never",
    )


class _Voice(BodyFields):
    prompt_text: str | None = Field(None, description="transcript of prompt_wav")
    prompt_wav: Recording | None = Field(
        None, description="recording of the voice: a file in a form, base64 in JSON; or use spk_id"
    )
    spk_id: str | None = Field(None, description="a voice from /spk_list, instead of prompt_wav")
    tts_model_name: str = Field("default", description="a style from /query_tts_model")


class VoiceChoice(Drawing, _Voice):
    """The voice, the LLM weights and the sampling parameters."""


class SoundChoice(BodyFields):
    """Format of the audio in the response."""

    stream: bool = Field(False, description="stream the audio as it is generated")
    speed: float = Field(
        1.0, ge=0.5, le=2.0, allow_inf_nan=False, description="at the same pitch; not together with stream"
    )
    format: Literal["pcm", "wav", "mp3", "opus", "aac", "flac"] = Field(
        "pcm", description="pcm is 16-bit little-endian, opus is in Ogg, aac is ADTS; all mono"
    )
    sample_rate: int | None = Field(None, description="sample rate in Hz; default: the checkpoint's")
    max_pause: float | None = Field(
        None, ge=0.05, le=10, description="longer pauses are cut to this many seconds"
    )


class TextFields(SoundChoice, Drawing):
    """A whole text, how it is drawn and how its audio leaves."""

    tts_text: str = Field(description="what to say")


class SpeechFields(TextFields, VoiceChoice):
    """POST /inference_zero_shot"""


_SPOKEN_LATER = "comes in the messages after the first"


class Opening(VoiceChoice):
    """The first message of a WebSocket."""

    word_timestamps: bool = Field(False, description="say when each word is spoken, in messages of their own")
    max_pause: float | None = Field(
        None, ge=0.05, le=10, description="seconds to which longer pauses are shortened"
    )

    elsewhere = {
        "stream": "is not available here: a WebSocket always streams",
        "speed": "is not available here: use it with stream false in /inference_zero_shot",
        "format": "is not available here: a WebSocket always sends pcm",
        "tts_text": _SPOKEN_LATER,
        "finish": _SPOKEN_LATER,
    }


class TextMessage(BodyFields):
    """Every later message of a WebSocket."""

    elsewhere = dict.fromkeys(
        VoiceChoice.model_fields, "belongs in the first message; later ones have tts_text or finish"
    )

    tts_text: str | None = None
    finish: bool = False


def random_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


def speech_options(fields: Drawing, longest: int, seed: int, speed: float = 1.0) -> SpeechOptions:
    """Return the requested options, with `seed` if the client gave none. `longest`: maximum number of tokens
    per part; `speed`: if the stages are to change the speed. Raises RequestError (400)."""
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
    return msgspec.convert({"seed": seed, **given, "speed": speed}, SpeechOptions)


class NewVoiceFields(BodyFields):
    """POST /add_spk"""

    elsewhere = dict.fromkeys(
        SpeechFields.model_fields.keys() - {"spk_id", "prompt_text", "prompt_wav"},
        "is not stored with a voice; send it to /inference_zero_shot",
    )

    spk_id: str = Field(description="name of the voice: letters, digits, _, - and .")
    prompt_text: str = Field(description="what is said in prompt_wav")
    prompt_wav: Recording


def wrong_field(name: str, message: str, kind: str = "value_error") -> RequestValidationError:
    """Return a FastAPI validation error for one field of the body."""
    return RequestValidationError([{"type": kind, "loc": ("body", name), "msg": message}])


def describe(error: RequestValidationError) -> str:
    """Return a one-line description of all invalid fields."""
    names = [".".join(str(step)[:MAX_SHOWN] for step in entry["loc"][1:]) for entry in error.errors()]
    return "; ".join(f"{name}: {entry['msg']}" for name, entry in zip(names, error.errors(), strict=True))


def parse(model: type[Fields], values: Any) -> Fields:
    """Validate `values`. Raises RequestValidationError (422)."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        for entry in errors:
            if entry["type"] == "extra_forbidden" and issubclass(model, BodyFields):
                entry["msg"] = model.why_unknown(str(entry["loc"][-1]))
            entry["loc"] = ("body", *entry["loc"])
        raise RequestValidationError(errors) from None


def parse_json(data: bytes | bytearray | str) -> Any:
    """Parse JSON. Raises RequestError (400)."""
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"malformed JSON: {error}") from None


async def read_body(request: Request, model: type[Body]) -> Body:
    """Read and validate the body of a request. Raises RequestError, RequestValidationError, HTTPException or
    ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        values = parse_json(await _whole_body(request))
        if not isinstance(values, dict):
            raise RequestError(400, "expected a JSON object")
        return parse(model, values)
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise RequestError(415, "the body must be multipart/form-data or application/json")
    values = await _form_values(request, model)
    return parse(model, {name: _form_value(model, name, value) for name, value in values.items()})


async def _form_values(request: Request, model: type[BodyFields]) -> dict[str, str | bytes]:
    """Return the values of a form: text, or the content of a file. Raises HTTPException or
    ClientDisconnect."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) <= MAX_PLAIN_FORM:
        body = await _whole_body(request)
        kind = request.headers.get("content-type", "")
        values = plain_form(kind, body, MAX_FORM_FILES, MAX_FORM_FIELDS)
        if values is not None:
            return values
        request = _with_body(request, body)
    async with request.form(max_files=MAX_FORM_FILES, max_fields=MAX_FORM_FIELDS) as form:
        return {name: await _content(model, name, value) for name, value in form.items()}


def _with_body(request: Request, body: bytes) -> Request:
    """Return the request with a body that has been read already."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, receive)


async def _content(model: type[BodyFields], name: str, value: UploadFile | str) -> str | bytes:
    if isinstance(value, str):
        return value
    return await value.read() if name in model.recordings else b""  # files elsewhere are rejected unread


def _form_value(model: type[BodyFields], name: str, value: str | bytes) -> str | bytes:
    """Return a form value. Raises RequestValidationError if text was sent instead of a file or vice versa."""
    if name not in model.model_fields:
        return ""  # the unknown field is rejected by name later
    if name not in model.recordings:
        if isinstance(value, bytes):
            raise wrong_field(name, "Value should be text, not a file")
        return value
    if isinstance(value, bytes):
        return value
    if value:
        file = value if len(value) <= MAX_SHOWN and value.isprintable() else "voice.wav"
        raise wrong_field(name, f"Value should be a file, not text; with curl: -F {name}=@{file}")
    return value


async def _whole_body(request: Request) -> bytes:
    """Read the whole body. Unlike request.body(), it is not kept until the response has been sent, nor
    referenced by the traceback when a client disconnects. Raises ClientDisconnect."""
    first, rest = b"", bytearray()  # most bodies arrive as one chunk, which need not be copied
    try:
        async for chunk in request.stream():
            if first:
                rest += chunk
            else:
                first = chunk
    except BaseException:
        first = b""
        rest.clear()
        raise
    return first + rest if rest else first


def check_text(name: str, text: str, limit: int, may_be_empty: bool = False) -> str:
    """Return `text` unchanged. Raises RequestError (400) if it cannot be spoken."""
    if len(text) > limit:
        raise RequestError(400, f"{name} has {len(text)} characters; at most {limit} are allowed", field=name)
    if "\0" in text:
        raise RequestError(400, f"{name} contains a null character", field=name)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(400, f"{name} is not valid Unicode (lone surrogate)", field=name) from None
    if not may_be_empty and not text.strip():
        raise RequestError(400, f"{name} is empty", field=name)
    if not may_be_empty and not can_become_speakable(text):
        raise RequestError(
            400,
            f"there is nothing to speak in {name}, only punctuation and symbols: letters or digits "
            "are required",
            field=name,
        )
    return text
