"""Submissions: the requests of one HTTP worker that are with the stages. Sends them, hands what comes back to
whoever waits for it, and submits again what a dead stage has lost."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from light_tts.server.core import messages
from light_tts.server.core.channel import Peers
from light_tts.server.core.metrics import request_recoveries_total
from light_tts.server.httpserver import recovery
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.request import LostAudio, SpeechRequest

log = logging.getLogger("light_tts.http")

Answer = messages.AudioChunk | messages.Encoded | messages.Routed | messages.Failed


class Call(Protocol):
    """Who waits for the audio of a request."""

    @property
    def request(self) -> SpeechRequest: ...

    def deliver(self, audio: list[bytes]) -> None:
        """More PCM, or the news that all has come."""

    def fail(self, error: RequestError) -> None:
        """No more audio will come; the request has been forgotten here."""


class Submissions:
    """`reply_to`: the address to which the stages send their answers."""

    def __init__(self, peers: Peers, reply_to: str) -> None:
        self.heard: dict[int, float] = {}  # decode index -> when audio last came from it
        self._peers = peers
        self._reply_to = reply_to
        self._calls: dict[str, Call] = {}  # by request id

    # -- what a call asks

    def submit(self, call: Call) -> None:
        """Send the call's request to the stages, now or when they are up. Raises RequestError where a stage
        that it needs has been given up."""
        reason = recovery.hindrance(call.request, self._peers)
        if reason:
            raise RequestError(503, reason)
        self._calls[call.request.request_id] = call
        self._try_to_send(call)

    def append(self, request: SpeechRequest, message: messages.AppendText | messages.FinishText) -> None:
        """Send more of a bistream request's text to its encode process; a request that waits to be submitted
        has it in its state already."""
        if request.submitted:
            self._send_to_encode(request, message)

    def forget(self, request: SpeechRequest) -> None:
        """Free everything that the stages hold for it. May be called twice."""
        if self._calls.pop(request.request_id, None) is None or not request.submitted:
            return
        if request.complete:
            self._send_to_encode(request, messages.Release(job=request.job))
        else:
            self._peers.broadcast(messages.Abort(job=request.job))

    # -- what the manager hears

    def take(self, answer: Answer) -> None:
        """What a stage says of a job; that of an earlier attempt is ignored."""
        call = self._calls.get(answer.job.rpartition("/")[0])
        if call is not None and call.request.submitted and call.request.job == answer.job:
            self._handle(call, answer)

    def stage_died(self, stage: str, index: int, incarnation: int, in_work: list[str]) -> None:
        """`in_work`: the jobs that it worked on."""
        encodes = len(self._peers.of("encode"))
        for call in list(self._calls.values()):
            request = call.request
            if not recovery.lost_with(request, stage, index, incarnation, encodes):
                continue
            if request.job in in_work and request.note_strike(stage, alone=len(in_work) == 1):
                log.error("%s is not tried again: %s died of it", request.request_id, stage)
                self._fail(call, 500, f"the {stage} stage died again while it worked on this alone")
            else:
                self._recover(call, f"{stage} {index} died")

    def send_waiting(self) -> None:
        """To be called when a stage is up, or given up."""
        for call in list(self._calls.values()):
            if not call.request.submitted:
                self._try_to_send(call)

    def fail_all(self, status: int, reason: str) -> None:
        for call in list(self._calls.values()):
            self._fail(call, status, reason)

    # -- inside

    def _send_to_encode(self, request: SpeechRequest, message: messages.Message) -> None:
        self._peers.send("encode", request.encode_index(len(self._peers.of("encode"))), message)

    def _try_to_send(self, call: Call) -> None:
        request = call.request
        reason = recovery.hindrance(request, self._peers)
        if reason:
            self._fail(call, 503, reason)
        elif reason is None:
            request.submitted = True
            for message in request.submission(self._reply_to):
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

    def _draw_again(self, call: Call) -> None:
        """At most once for a request; then it has failed."""
        request = call.request
        if request.drawn_again:
            self._fail(call, 500, "the model ended twice before it said anything: try another seed or text")
            return
        log.warning("%s no speech with seed %d; drawn again", request.request_id, request.speech.options.seed)
        self._peers.broadcast(messages.Abort(job=request.job))
        request.draw_again()
        self._try_to_send(call)

    def _handle(self, call: Call, answer: Answer) -> None:
        request = call.request
        match answer:
            case messages.Encoded(text_tokens=count, words=words):
                request.text_tokens, request.words = count, words
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
            self.heard[request.routed.decode] = time.monotonic()
        if request.lacks_speech:
            self._draw_again(call)
            return
        call.deliver(audio)
        if request.complete:
            self.forget(request)
