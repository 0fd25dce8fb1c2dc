"""All messages between processes, that is, the protocol.

A message is an immutable struct. On the wire (wire.py) it is one ZeroMQ multipart message: a msgpack header
followed by one raw frame for each `Raw` field (audio, arrays), which is neither copied into the header nor
pickled.

A *job* is one attempt at one client request, named `<request id>/<attempt>`. When a stage dies, the HTTP
worker aborts the job and resubmits the request as the next attempt, together with what has already been
delivered (`PartProgress`); stages need no other recovery state. A *part* is one piece of a long text; parts
are numbered from 0 and spoken in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import numpy as np


class Raw:
    """Bulk data sent as a separate frame. `data` supports the buffer protocol. numpy is imported when it is
    used: the supervisor starts the stages without it."""

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data

    @classmethod
    def of(cls, array: np.ndarray) -> Raw:
        import numpy as np

        return cls(np.ascontiguousarray(array))

    def array(self, dtype: Any) -> np.ndarray:
        """Return the frame as a one-dimensional read-only array of `dtype`."""
        import numpy as np

        return np.frombuffer(self.data, dtype=dtype)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base class of all messages; the tag on the wire is the class name."""


class MessagePart(msgspec.Struct, frozen=True, kw_only=True):
    """Base class of structs embedded in messages."""


# ---------------------------------------------------------------- contents of a request


class SpeechOptions(MessagePart, frozen=True):
    """Per-request speech options, carried unchanged from the HTTP field to the stage that uses them. None
    means the checkpoint's default or, for the lengths, a value derived from the text.

    Encode passes them on; the LLM uses the seed, lengths and sampling options, decode the seed and speed.
    `report`: report the number of text tokens (encode); `word_times`: report when each word is spoken (encode
    and LLM); `traced`: report when they worked (LLM and decode).
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
    traced: bool = False


class Prompt(MessagePart, frozen=True):
    """The voice to use, as the HTTP worker passes it to an encode process.

    Either `audio` (float32 mono, -1..1, at `sample_rate` Hz; `key` is its hash) or `speaker`, the name of a
    speaker in the checkpoint (spk2info.pt). `audio` may be omitted if encode already has the features.
    """

    text: str = ""
    key: str = ""
    sample_rate: int = 0
    audio: Raw | None = None
    speaker: str = ""


class PromptRef(MessagePart, frozen=True):
    """Reference to the shared-memory segment that holds the features of a prompt (see prompt_cache)."""

    key: str
    owner: int
    segment: str


class PartProgress(MessagePart, frozen=True):
    """The audio of a part that the client has received: the tokens it was made from, and the number of
    samples.

    `tokens` are the LLM's outputs in order, bistream fill ids included, so that the LLM's state can be
    restored exactly.
    """

    tokens: list[int] = []
    samples: int = 0
    finished: bool = False


# ---------------------------------------------------------------- HTTP worker -> encode, LLM


class Expect(Message, frozen=True):
    """A request is being read, so messages about it will arrive within milliseconds."""


# ---------------------------------------------------------------- HTTP worker -> encode


class Synthesize(Message, frozen=True):
    """Request to speak `text`. Sent by an HTTP worker to the encode process that owns the prompt.

    `alone_in`: stages that must process the job without others, because they died while processing it before.
    `bistream`: `text` is empty and arrives in AppendText messages until FinishText; the job has exactly one
    part.
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
    """The next piece of text of a bistream job, in order. HTTP worker -> encode"""

    job: str
    text: str


class FinishText(Message, frozen=True):
    """The text of a bistream job is complete. HTTP worker -> encode"""

    job: str


class Release(Message, frozen=True):
    """The job is over (delivered, failed or aborted): unpin its prompt. HTTP worker -> encode"""

    job: str


class Abort(Message, frozen=True):
    """Drop the job at once, including any message of it still in flight. HTTP worker -> every stage"""

    job: str


# ---------------------------------------------------------------- encode -> HTTP worker, LLM


class Encoded(Message, frozen=True):
    """The number of text tokens of a job. `words`: the words of each part as they are spoken, if word times
    were requested. Sent once for `report`, `traced` or `word_times`, and if the text arrived complete; for a
    bistream job with word times, sent for all the text so far whenever more has arrived.
    encode -> HTTP worker"""

    job: str
    text_tokens: int
    words: list[list[str]] = []


class Generate(Message, frozen=True):
    """Request to generate the speech tokens of one part. encode -> LLM

    `prompt_speech_token`: int32 frame, the LLM's speech prompt (empty if the mode has none).
    `flow_prompt_tokens`: length of the flow's prompt, which determines where streaming chunks end. `stream`:
    send tokens chunk by chunk rather than at the end. `words`: the number of `text_ids` in each word, if word
    times were requested or the part is checked for skipped and repeated words. `leading_ids`: the number of
    `prompt_text_ids` that are instructions, at their beginning; bistream does not mix these with speech.
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
    leading_ids: int = 0


class AppendIds(Message, frozen=True):
    """The next text ids of a bistream job, in order. `words`, if word times were requested: the number of ids
    of each word of all the text so far; the last word may still grow. encode -> LLM"""

    job: str
    ids: list[int]
    words: list[int] = []


class FinishIds(Message, frozen=True):
    """The text ids of a bistream job are complete. encode -> LLM"""

    job: str


# ---------------------------------------------------------------- LLM -> HTTP worker, decode


class Routed(Message, frozen=True):
    """Which decode process, and which incarnation of it, handles this job. LLM -> HTTP worker"""

    job: str
    decode: int
    incarnation: int


class OpenSpeech(Message, frozen=True):
    """Announces the tokens of a part. Sent once per part, before its first SpeechTokens. LLM -> decode"""

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
    """More tokens of a part, in order (bistream fill ids included, stop ids excluded). The first message of a
    resumed part starts with all of `progress.tokens`. `times`, if requested: for each word spoken so far, the
    index of its first token and the index after its last, not counting fill ids; in the last message, for
    bistream jobs in every message. `clock`, in the last message if traced: when the part arrived, was
    admitted and was finished, in monotonic seconds. LLM -> decode"""

    job: str
    part: int
    tokens: list[int]
    final: bool
    times: list[int] = []
    clock: list[float] = []


# ---------------------------------------------------------------- any stage -> HTTP worker


class AudioChunk(Message, frozen=True):
    """Samples of one part, in order. decode -> HTTP worker

    `tokens`: the LLM outputs these samples were made from (following those of the previous chunk). `start`:
    index of the first sample within the part. `pcm`: int16 frame, mono. `final`: last chunk of the part; the
    job is complete with the final chunk of part `parts - 1`. `times`: copied from the latest SpeechTokens of
    the part; complete in the final chunk. `clock`, in the final chunk: that of the part's SpeechTokens, and
    when decode began the part and finished it.
    """

    job: str
    part: int
    parts: int
    start: int
    tokens: list[int]
    pcm: Raw
    final: bool
    times: list[int] = []
    clock: list[float] = []


class Failed(Message, frozen=True):
    """The job has failed. `code` is the HTTP status for the client. With `retry` the HTTP worker resubmits
    the request instead, because a resource owned by another process is gone."""

    job: str
    stage: str
    code: int
    message: str
    retry: bool = False


# ---------------------------------------------------------------- supervisor and all processes


class StageInfo(MessagePart, frozen=True):
    """One stage process. `state`: starting, up, silent (up but making no progress), down (being restarted) or
    failed (given up)."""

    stage: str
    index: int
    incarnation: int
    address: str
    state: str
    reason: str = ""
    info: dict[str, Any] = {}


class WorkerHello(Message, frozen=True):
    """An HTTP worker is up. The supervisor answers with Topology. HTTP worker -> supervisor"""

    address: str
    pid: int


class StageReady(Message, frozen=True):
    """The stage has loaded its models and accepts messages. `info` is read from the checkpoint (encode:
    speakers; decode: sample_rate). stage -> supervisor"""

    stage: str
    index: int
    incarnation: int
    info: dict[str, Any] = {}


class StageStartFailed(Message, frozen=True):
    """The stage cannot start; `reason` is shown to the operator. stage -> supervisor"""

    stage: str
    index: int
    incarnation: int
    reason: str


class Topology(Message, frozen=True):
    """The current state of all stages, for a stage or HTTP worker that has just started. `worker_slot`: this
    HTTP worker's slot in the shared counters (-1 for a stage). supervisor -> stage or HTTP worker"""

    stages: list[StageInfo]
    worker_slot: int = -1
    draining: bool = False


class StageDown(Message, frozen=True):
    """A stage process died. From now on messages for it go to `next.address`, where they wait until the next
    incarnation is up. `in_work`: the jobs it was processing. supervisor -> all"""

    stage: str
    index: int
    incarnation: int
    next: StageInfo
    in_work: list[str] = []


class StageUp(Message, frozen=True):
    """A stage is up, or up again. supervisor -> all"""

    stage: StageInfo


class StageSilent(Message, frozen=True):
    """A stage makes no progress and will be killed soon. StageUp follows if it recovers first. supervisor ->
    all"""

    stage: StageInfo


class StageGivenUp(Message, frozen=True):
    """A stage kept dying and will not be restarted; requests that need it get 503. supervisor -> all"""

    stage: str
    index: int
    reason: str


class WorkerGone(Message, frozen=True):
    """An HTTP worker died: abort and release every job with this reply address. supervisor -> stages"""

    address: str


class Drain(Message, frozen=True):
    """Accept no new requests; finish those accepted. supervisor -> HTTP workers"""


class Shutdown(Message, frozen=True):
    """Exit now. supervisor -> stages"""
