"""Submissions, one per HTTP worker: submits requests to the stages, passes their audio to the calls, and
resubmits what a dead stage has lost."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Protocol

from light_tts.server.core import messages
from light_tts.server.core.channel import Peers
from light_tts.server.core.metrics import redrawn_total, request_recoveries_total
from light_tts.server.core.prompt_cache import segment_path
from light_tts.server.httpserver import recovery
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.request import LostAudio, SpeechRequest

log = logging.getLogger("light_tts.http")

Answer = messages.AudioChunk | messages.Encoded | messages.Routed | messages.Failed


class Call(Protocol):
    """Receiver of a request's audio."""

    @property
    def request(self) -> SpeechRequest: ...

    def deliver(self, audio: list[bytes]) -> None:
        """Called with more PCM, and when all audio has arrived."""

    def fail(self, error: RequestError) -> None:
        """Called when no more audio will come; the stages have been told to drop the request."""


class Submissions:
    """`reply_to`: address to which the stages send their answers; `prompts`: the prompt cache's directory."""

    def __init__(self, peers: Peers, reply_to: str, prompts: Path) -> None:
        self.last_audio: dict[int, float] = {}  # decode index -> time of its latest audio
        self._peers = peers
        self._reply_to = reply_to
        self._prompts = prompts
        self._calls: dict[str, Call] = {}  # by request id

    # -- called by SpeechCall

    def submit(self, call: Call) -> None:
        """Send the call's request to the stages, now or once they are up. Raises RequestError if a stage it
        needs has been given up."""
        reason = recovery.blocking_reason(call.request, self._peers)
        if reason:
            raise RequestError(503, reason)
        self._calls[call.request.request_id] = call
        self._try_to_send(call)

    def append(self, request: SpeechRequest, message: messages.AppendText | messages.FinishText) -> None:
        """Send more of the text of a submitted bistream request to its encode process. A request not
        submitted yet already has it in its state."""
        if request.submitted:
            self._send_to_encode(request, message)

    def forget(self, request: SpeechRequest) -> None:
        """Free everything that the stages hold for a request that has ended. May be called twice."""
        if self._calls.pop(request.request_id, None) is None or not request.submitted:
            return
        if request.complete:
            self._send_to_encode(request, messages.Release(job=request.job))
        else:
            self._peers.broadcast(messages.Abort(job=request.job))

    # -- called by HttpServerManager

    def take(self, answer: Answer) -> None:
        """Handle a stage's message about a job; messages about earlier attempts are ignored."""
        call = self._calls.get(answer.job.rpartition("/")[0])
        if call is not None and call.request.submitted and call.request.job == answer.job:
            self._handle(call, answer)

    def stage_died(self, stage: str, index: int, incarnation: int, in_work: list[str]) -> None:
        """Retry or fail the requests affected by the death of a stage. `in_work`: the jobs it was
        processing."""
        encodes = len(self._peers.of("encode"))
        for call in list(self._calls.values()):
            request = call.request
            if not recovery.lost_with(request, stage, index, incarnation, encodes):
                continue
            if request.job in in_work and request.note_strike(stage, alone=len(in_work) == 1):
                log.error("%s is not retried: it made %s die", request.request_id, stage)
                reason = f"the {stage} stage died again while it processed only this request"
                self._fail(call, 500, reason)
            else:
                self._recover(call, f"{stage} {index} died")

    def send_waiting(self) -> None:
        """Submit the requests that waited for stages. To be called when a stage is up or given up."""
        for call in list(self._calls.values()):
            if not call.request.submitted:
                self._try_to_send(call)

    def fail_all(self, status: int, reason: str) -> None:
        for call in list(self._calls.values()):
            self._fail(call, status, reason)

    # -- internal

    def _send_to_encode(self, request: SpeechRequest, message: messages.Message) -> None:
        self._peers.send("encode", request.encode_index(len(self._peers.of("encode"))), message)

    def _prompt_known(self, request: SpeechRequest) -> bool:
        """Whether the encode process has the features of the recording. If they are evicted meanwhile it says
        so, and the next attempt sends the recording."""
        key = request.speech.prompt.key
        if not key or request.attempt:
            return False
        owner = request.encode_index(len(self._peers.of("encode")))
        return segment_path(self._prompts, owner, key).exists()

    def _try_to_send(self, call: Call) -> None:
        request = call.request
        reason = recovery.blocking_reason(request, self._peers)
        if reason:
            self._fail(call, 503, reason)
        elif reason is None:
            request.submitted = True
            request.sent_at = time.monotonic()
            for message in request.submission(self._reply_to, self._prompt_known(request)):
                self._send_to_encode(request, message)

    def _fail(self, call: Call, status: int, reason: str) -> None:
        self.forget(call.request)
        call.fail(RequestError(status, reason))

    def _recover(self, call: Call, why: str, after_loss: bool = False) -> None:
        request = call.request
        self._peers.broadcast(messages.Abort(job=request.job))
        request.start_attempt(after_loss)
        if request.fruitless_attempts >= recovery.MAX_FRUITLESS_ATTEMPTS:
            self._fail(call, 503, f"given up after {request.fruitless_attempts} attempts: {why}")
            return
        log.warning("%s attempt %d: %s", request.request_id, request.attempt, why)
        request_recoveries_total.inc()
        self._try_to_send(call)

    def _retry_with_next_seed(self, call: Call) -> None:
        """Retry with another seed, at most once per request; then fail it."""
        request = call.request
        if request.next_seed_tried:
            self._fail(call, 500, "the model produced no speech in two attempts: try another seed or text")
            return
        seed = request.speech.options.seed
        log.warning("%s no speech with seed %d; retrying with another seed", request.request_id, seed)
        redrawn_total.labels("silent").inc()
        self._peers.broadcast(messages.Abort(job=request.job))
        request.retry_with_next_seed()
        self._try_to_send(call)

    def _handle(self, call: Call, answer: Answer) -> None:
        request = call.request
        match answer:
            case messages.Encoded(text_tokens=count, words=words):
                request.text_tokens, request.words = count, words
                request.encoded_at = time.monotonic()
            case messages.Routed():
                request.routed = answer
                if recovery.routed_to_dead(answer, self._peers):
                    self._recover(call, f"decode {answer.decode} is gone")
            case messages.AudioChunk():
                self._take_audio(call, answer)
            case messages.Failed(retry=True, stage=stage, message=text):
                self._recover(call, f"{stage}: {text}", after_loss=True)
            case messages.Failed(stage=stage, code=code, message=text):
                if code >= 500:
                    log.error("%s failed in %s: %s", request.request_id, stage, text)
                self._fail(call, code, text)

    def _take_audio(self, call: Call, chunk: messages.AudioChunk) -> None:
        request = call.request
        try:
            audio = request.take(chunk)
        except LostAudio as error:
            self._recover(call, str(error), after_loss=True)
            return
        if request.routed is not None:
            self.last_audio[request.routed.decode] = time.monotonic()
        if request.lacks_speech:
            self._retry_with_next_seed(call)
            return
        call.deliver(audio)
        if request.complete:
            self.forget(request)
