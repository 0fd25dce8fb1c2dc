"""Every message between processes. Reading this module is reading the protocol.

A message is an immutable struct. On the wire it is one ZeroMQ multipart message: a msgpack header followed
by one raw frame for each `Raw` field (audio, arrays), which is never copied into the header nor pickled.

A *job* is one attempt at one client request: `<request id>/<attempt>`. When a stage dies, the HTTP worker
aborts the job and submits the request again as the next attempt, with what has been delivered so far
(`PartProgress`); stages never need to know more. A *part* is one piece of a long text; parts are numbered
from 0 and spoken in order.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec
import numpy as np

PROTOCOL_VERSION = 1


class Raw:
    """Bulk data that travels as a frame of its own. `data` supports the buffer protocol."""

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data

    @classmethod
    def of(cls, array: np.ndarray) -> Raw:
        return cls(np.ascontiguousarray(array))

    def array(self, dtype: Any) -> np.ndarray:
        """One-dimensional read-only view of the frame as `dtype`."""
        return np.frombuffer(self.data, dtype=dtype)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the tag on the wire is the class name."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Not a message: the parts of one."""


# ---------------------------------------------------------------- what a request is made of


class SpeechOptions(Part, frozen=True):
    """How to speak: what a client may choose, on its way from the field of that name to the stage that acts
    on it. None means the checkpoint's value, or for the lengths the one that follows from the text.

    Encode passes them on as they are; the LLM acts on seed, lengths and sampling, decode on seed and speed.
    `word_times`: say when each word is spoken (encode and LLM).
    """

    seed: int
    speed: float = 1.0
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    temperature: float | None = None
    win_size: int | None = None
    tau_r: float | None = None
    report: bool = False
    word_times: bool = False


class Prompt(Part, frozen=True):
    """The voice to speak with, as the HTTP worker hands it to an encode process.

    Either `audio` (float32 mono, -1..1, at `sample_rate` Hz; `key` is its hash) or `speaker`, a speaker
    stored in the checkpoint (spk2info.pt).
    """

    text: str = ""
    key: str = ""
    sample_rate: int = 0
    audio: Raw | None = None
    speaker: str = ""


class PromptRef(Part, frozen=True):
    """Where a decode process finds the features of a prompt: a shared-memory segment (see prompt_cache)."""

    key: str
    owner: int
    segment: str


class PartProgress(Part, frozen=True):
    """What the client has got of one part: the tokens its audio was made from, and the samples delivered.

    `tokens` are the LLM's outputs in order, bistream fill ids included, so that the LLM can be put back into
    exactly this state.
    """

    tokens: list[int] = []
    samples: int = 0
    finished: bool = False


# ---------------------------------------------------------------- HTTP worker -> encode


class Synthesize(Message, frozen=True):
    """Speak `text`. Sent by an HTTP worker to the encode process that owns the prompt.

    `alone_in`: stages that must work on it alone, because they died while they worked on it before.
    `bistream`: text is empty here and arrives by AppendText until FinishText; there is exactly one part then.
    """

    job: str
    reply_to: str
    style: int
    text: str
    prompt: Prompt
    options: SpeechOptions
    stream: bool
    bistream: bool = False
    progress: list[PartProgress] = []
    alone_in: list[str] = []


class AppendText(Message, frozen=True):
    """The next piece of text of a bistream job, in order."""

    job: str
    text: str


class FinishText(Message, frozen=True):
    """No more text will come for this bistream job."""

    job: str


class Release(Message, frozen=True):
    """The job is over (audio delivered, failed or aborted): unpin its prompt. To the encode process."""

    job: str


class Abort(Message, frozen=True):
    """Forget the job at once, and any message of it that is still under way. HTTP worker -> every stage."""

    job: str


# ---------------------------------------------------------------- encode -> HTTP worker, LLM


class Encoded(Message, frozen=True):
    """The text of this job has so many tokens; `words`: of each part, as they are spoken, where their times
    are wanted. encode -> HTTP worker, for a text that was there at once."""

    job: str
    text_tokens: int
    words: list[list[str]] = []


class Generate(Message, frozen=True):
    """Generate the speech tokens of one part.

    `prompt_speech_token`: int32 frame, the LLM's speech prompt (empty where the mode has none).
    `flow_prompt_tokens`: length of the flow's prompt, which sets where streaming chunks end.
    `stream`: hand tokens on chunk by chunk rather than at the end. `words`: how many of `text_ids` each word
    has, where the words' times are wanted.
    """

    job: str
    reply_to: str
    part: int
    parts: int
    prompt_text_ids: list[int]
    text_ids: list[int]
    prompt_speech_token: Raw
    flow_prompt_tokens: int
    prompt: PromptRef | None
    speaker: str
    options: SpeechOptions
    stream: bool
    bistream: bool
    progress: PartProgress
    alone_in: list[str] = []
    words: list[int] = []


class AppendIds(Message, frozen=True):
    """Text ids of the next piece of a bistream job, in order. encode -> LLM"""

    job: str
    ids: list[int]


class FinishIds(Message, frozen=True):
    """No more text ids will come for this bistream job. encode -> LLM"""

    job: str


# ---------------------------------------------------------------- LLM -> HTTP worker, decode


class Routed(Message, frozen=True):
    """Which decode process (and which incarnation of it) will speak this job. LLM -> HTTP worker"""

    job: str
    decode: int
    incarnation: int


class OpenSpeech(Message, frozen=True):
    """Tokens of this part will follow. LLM -> decode, once a part, before its first SpeechTokens."""

    job: str
    reply_to: str
    part: int
    parts: int
    prompt: PromptRef | None
    speaker: str
    options: SpeechOptions
    stream: bool
    progress: PartProgress
    alone_in: list[str] = []


class SpeechTokens(Message, frozen=True):
    """More tokens of a part, in order (bistream fill ids included, stop ids never); the first message of a
    resumed part begins with all of `progress.tokens`. `times`, with the final ones, where they are wanted:
    the token with which each word begins, and the one behind its last. LLM -> decode"""

    job: str
    part: int
    tokens: list[int]
    final: bool
    times: list[int] = []


# ---------------------------------------------------------------- any stage -> HTTP worker


class AudioChunk(Message, frozen=True):
    """Samples of one part, in order. decode -> HTTP worker

    `tokens`: the LLM outputs these samples were made from (they follow those of the chunk before).
    `start`: index in the part of the first sample. `pcm`: int16 frame, mono.
    `final`: last chunk of the part; the job is complete with the final chunk of part `parts - 1`. `times`:
    those of the part's SpeechTokens, with the final chunk.
    """

    job: str
    part: int
    parts: int
    start: int
    tokens: list[int]
    pcm: Raw
    final: bool
    times: list[int] = []


class Failed(Message, frozen=True):
    """The job cannot go on. `code` is the HTTP status for the client; with `retry` the HTTP worker submits
    the request again instead (a resource another process owned has gone)."""

    job: str
    stage: str
    code: int
    message: str
    retry: bool = False


# ---------------------------------------------------------------- supervisor and everybody


class StageInfo(Part, frozen=True):
    """One stage process. `state`: starting, up, silent (up, but it shows no progress), down (being restarted)
    or failed (given up)."""

    stage: str
    index: int
    incarnation: int
    address: str
    state: str
    reason: str = ""
    info: dict[str, Any] = {}


class WorkerHello(Message, frozen=True):
    """An HTTP worker is up. HTTP worker -> supervisor, which answers with Topology."""

    address: str
    pid: int


class StageReady(Message, frozen=True):
    """Models are loaded; messages are being taken. `info` is what the stage learned from the checkpoint
    (encode: speakers; decode: sample_rate). stage -> supervisor"""

    stage: str
    index: int
    incarnation: int
    info: dict[str, Any] = {}


class StageStartFailed(Message, frozen=True):
    """The stage cannot start; `reason` is what the operator must read. stage -> supervisor"""

    stage: str
    index: int
    incarnation: int
    reason: str


class Topology(Message, frozen=True):
    """All stages as they are now. supervisor -> a stage or HTTP worker that has just started.

    `worker_slot`: this HTTP worker's place in the shared counters (-1 for a stage).
    """

    stages: list[StageInfo]
    worker_slot: int = -1
    draining: bool = False


class StageDown(Message, frozen=True):
    """A stage process died; messages for it go to `next.address` from now on, where they wait until the
    next incarnation is up. `in_work`: the jobs it worked on at that moment. supervisor -> everybody"""

    stage: str
    index: int
    incarnation: int
    next: StageInfo
    in_work: list[str] = []


class StageUp(Message, frozen=True):
    """A stage is up (again). supervisor -> everybody"""

    stage: StageInfo


class StageSilent(Message, frozen=True):
    """A stage shows no progress: it is killed soon unless it does; StageUp follows if so. supervisor ->
    everybody"""

    stage: StageInfo


class StageGivenUp(Message, frozen=True):
    """A stage kept dying and is not started again: requests that need it end in 503. supervisor -> all"""

    stage: str
    index: int
    reason: str


class WorkerGone(Message, frozen=True):
    """An HTTP worker died: abort and release every job with this reply address. supervisor -> stages"""

    address: str


class Drain(Message, frozen=True):
    """Accept no more requests; finish those accepted. supervisor -> HTTP workers"""


class Shutdown(Message, frozen=True):
    """End now. supervisor -> stages"""


# ---------------------------------------------------------------- wire format

_ANY: Any = Union[tuple(Message.__subclasses__())]  # noqa: UP007 (built from a list)


def encode(message: Message) -> list[Any]:
    """Frames to send: version byte + msgpack header, then the raw frames."""
    frames: list[Any] = []

    def take_raw(obj: Any) -> int:
        if isinstance(obj, Raw):
            frames.append(obj.data)
            return len(frames)
        raise TypeError(f"cannot send {type(obj)} in a message")

    header = msgspec.msgpack.Encoder(enc_hook=take_raw).encode(message)
    return [bytes((PROTOCOL_VERSION,)) + header, *frames]


def decode(frames: list[Any]) -> Message:
    """The message in these frames. Raises ValueError for another version or a malformed message."""

    def give_raw(kind: type, obj: Any) -> Any:
        if kind is Raw and isinstance(obj, int) and 0 < obj < len(frames):
            return Raw(frames[obj])
        raise ValueError(f"bad {kind.__name__} field")

    header = memoryview(frames[0])
    if len(header) < 1 or header[0] != PROTOCOL_VERSION:
        raise ValueError("message of another protocol version")
    return msgspec.msgpack.Decoder(_ANY, dec_hook=give_raw).decode(header[1:])
