"""State of one client request over all its attempts: what was asked, what has arrived, and what can be sent
on.

Pure state without sockets or a clock. It is the only state of a request that must not be lost: when a stage
dies, `start_attempt` and `submission` produce the messages that make the stages continue where the audio
ends.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import msgspec

from light_tts.common.speakable import can_become_speakable
from light_tts.server.core import messages

MAX_DEATHS = 5  # of stages that were processing this request alone


class LostAudio(Exception):
    """A chunk does not follow the previous one: something in between was lost."""


@dataclass(frozen=True)
class WantedSpeech:
    """A request for speech. `text` is empty for `bistream`, where it arrives in pieces."""

    style: int
    prompt: messages.Prompt
    options: messages.SpeechOptions
    text: str = ""
    stream: bool = False
    bistream: bool = False


@dataclass
class PartReceived:
    """Received audio of one part. `held`: audio waiting for earlier parts to finish; `times`: word times,
    `clock`: when the stages worked on it, see AudioChunk."""

    tokens: list[int] = field(default_factory=list)
    samples: int = 0
    finished: bool = False
    held: list[bytes] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)


class SpeechRequest:
    """One request. `request_id` is globally unique; a job is `<request_id>/<attempt>`."""

    def __init__(self, request_id: str, speech: WantedSpeech) -> None:
        self.request_id = request_id
        self.speech = speech
        self.attempt = 0
        self.submitted = False
        self.routed: messages.Routed | None = None
        self.fruitless_attempts = 0
        self.strikes: dict[str, int] = {}  # stage that died while processing it -> samples received by then
        self.deaths = 0  # number of stages that died while processing it alone
        self.part_count: int | None = None
        self.parts: list[PartReceived] = []
        self.texts: list[str] = []
        self.text_finished = False
        self.next_seed_tried = False
        self.text_tokens = 0
        self.words: list[list[str]] = []  # words of each part, if word times were requested
        self.sent_at: float | None = None  # to encode, monotonic seconds
        self.encoded_at: float | None = None
        self._speaking = 0

    @property
    def job(self) -> str:
        return f"{self.request_id}/{self.attempt}"

    @property
    def text(self) -> str:
        """All that has come of it."""
        return self.speech.text or "".join(self.texts)

    @property
    def complete(self) -> bool:
        """Whether all audio of all parts has arrived."""
        return (
            self.part_count is not None
            and len(self.parts) == self.part_count
            and all(part.finished for part in self.parts)
        )

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of text tokens and of speech tokens received so far, with OpenAI's names."""
        spoken = sum(len(part.tokens) for part in self.parts)
        return {
            "input_tokens": self.text_tokens,
            "output_tokens": spoken,
            "total_tokens": self.text_tokens + spoken,
        }

    @property
    def lacks_speech(self) -> bool:
        """Whether the model ended without producing speech although the text can be spoken."""
        return (
            self.complete and not any(part.samples for part in self.parts) and can_become_speakable(self.text)
        )

    def encode_index(self, encode_processes: int) -> int:
        """Return the index of the encode process that owns the prompt; every process computes the same from
        its key."""
        key = self.speech.prompt.key or hashlib.sha256(self.speech.prompt.speaker.encode()).hexdigest()
        return int(key, 16) % encode_processes

    def start_attempt(self, after_loss: bool = False) -> None:
        """Start a new attempt, which invalidates all messages of the previous job. `after_loss`: the previous
        attempt lost data although no stage died."""
        self.attempt += 1
        self.submitted = False
        self.routed = None
        if after_loss:
            self.fruitless_attempts += 1

    def retry_with_next_seed(self) -> None:
        """Start an attempt from the beginning with the next seed; only valid if no audio has been sent."""
        options = self.speech.options
        following = msgspec.structs.replace(options, seed=(options.seed + 1) % 2**32)
        self.speech = replace(self.speech, options=following)
        self.parts, self.part_count, self._speaking = [], None, 0
        self.next_seed_tried = True
        self.start_attempt()

    def note_strike(self, stage: str, alone: bool) -> bool:
        """Record that a stage died while processing the current attempt, `alone` or with others. Return
        whether the request is certainly the cause: processed alone, and either no further than at the
        previous death of this stage, or for the MAX_DEATHS-th time."""
        received = sum(part.samples for part in self.parts)
        again = self.strikes.get(stage) == received
        self.strikes[stage] = received
        self.deaths += alone
        return alone and (again or self.deaths >= MAX_DEATHS)

    def submission(self, reply_to: str, prompt_known: bool = False) -> list[messages.Message]:
        """Return the messages to the encode process that make the stages produce what has not arrived yet.
        `prompt_known`: it has the features of the prompt and needs no recording."""
        speech = self.speech
        prompt = msgspec.structs.replace(speech.prompt, audio=None) if prompt_known else speech.prompt
        first = messages.Synthesize(
            job=self.job,
            reply_to=reply_to,
            style=speech.style,
            text=speech.text,
            prompt=prompt,
            options=speech.options,
            stream=speech.stream,
            bistream=speech.bistream,
            progress=self.progress(),
            alone_in=sorted(self.strikes),
        )
        pieces = [messages.AppendText(job=self.job, text=text) for text in self.texts]
        end = [messages.FinishText(job=self.job)] if self.text_finished else []
        return [first, *pieces, *end]

    def progress(self) -> list[messages.PartProgress]:
        """Return what has been received of each part, from part 0 to the last one with any audio."""
        return [
            messages.PartProgress(tokens=list(part.tokens), samples=part.samples, finished=part.finished)
            for part in self.parts
        ]

    def take(self, chunk: messages.AudioChunk) -> list[bytes]:
        """Add a chunk; return the PCM that can be sent now, in order. Audio of a later part is held until the
        earlier parts have finished; a repeated chunk is ignored. Raises LostAudio, without any change, if a
        chunk is missing."""
        if chunk.job != self.job:
            return []
        if not 0 <= chunk.part < chunk.parts or self.part_count not in (None, chunk.parts):
            raise LostAudio(f"part {chunk.part} of {chunk.parts}, after parts had been {self.part_count}")
        pcm = bytes(chunk.pcm.data)
        part = self.parts[chunk.part] if chunk.part < len(self.parts) else PartReceived()
        if part.finished or chunk.start < part.samples:
            return []
        if chunk.start > part.samples:
            raise LostAudio(f"part {chunk.part} goes on at {chunk.start}, after sample {part.samples}")
        while len(self.parts) < chunk.part:
            self.parts.append(PartReceived())
        if len(self.parts) == chunk.part:
            self.parts.append(part)
        self.part_count = chunk.parts
        self.fruitless_attempts = 0
        part.tokens += chunk.tokens
        part.samples += len(pcm) // 2
        part.finished = chunk.final
        part.times = chunk.times or part.times
        part.clock = chunk.clock or part.clock
        if pcm:
            part.held.append(pcm)
        return self._release()

    def _release(self) -> list[bytes]:
        audio: list[bytes] = []
        while self._speaking < len(self.parts):
            part = self.parts[self._speaking]
            audio += part.held
            part.held.clear()
            if not part.finished:
                break
            self._speaking += 1
        return audio
