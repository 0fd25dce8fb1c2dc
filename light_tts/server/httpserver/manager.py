"""HttpServerManager, one per HTTP worker: submits requests to the stages, passes their audio to the routes,
and resubmits what a dead stage has lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time

from light_tts.server.core import messages
from light_tts.server.core.channel import AsyncInbox, Outbox, Peers
from light_tts.server.core.counters import ActiveRequests, ServiceRate
from light_tts.server.core.metrics import refused_total, request_recoveries_total
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.core.styles import Style
from light_tts.server.httpserver import recovery
from light_tts.server.httpserver.admission import Admission, Place, expected_audio
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.request import Call, LostAudio, SpeechRequest

HELLO_TIMEOUT = 30.0  # seconds to wait for the supervisor's answer
DEFAULT_SAMPLE_RATE = 24_000

log = logging.getLogger("light_tts.http")


class HttpServerManager:
    """The HTTP worker's connection to the stages. Start and close it in the worker's event loop; all methods
    must be called from that loop."""

    def __init__(self, settings: Settings, run_dir: RunDir, styles: tuple[Style, ...]) -> None:
        self.settings = settings
        self.styles = styles
        self._run_dir = run_dir
        self._outbox = Outbox()
        self.peers = Peers(self._outbox)
        self.slot = -1  # this worker's slot in the shared counters
        self._connected = asyncio.Event()
        self._calls: dict[str, Call] = {}  # by request id
        self.heard: dict[int, float] = {}  # decode index -> time of its latest audio

    async def start(self) -> None:
        """Connect to the supervisor. Raises RuntimeError if it does not answer."""
        self._run_dir.register_process()
        self._active = ActiveRequests(self._run_dir.shm)
        self._rate = ServiceRate(self._run_dir.shm)
        self._inbox = AsyncInbox(self._run_dir.worker_address())
        self._receiver = asyncio.create_task(self._receive())
        self._outbox.send(
            self._run_dir.supervisor, messages.WorkerHello(address=self._inbox.address, pid=os.getpid())
        )
        try:
            await asyncio.wait_for(self._connected.wait(), HELLO_TIMEOUT)
        except asyncio.TimeoutError:
            await self.close()
            raise RuntimeError(f"the supervisor did not answer within {HELLO_TIMEOUT:g} s") from None

    async def close(self) -> None:
        for call in list(self._calls.values()):
            call.fail(RequestError(503, "the server is shutting down"))
        self._receiver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiver
        self._inbox.close()
        self._outbox.close(linger=0.2)
        self._active.close()
        self._rate.close()

    # -- called by routes

    @property
    def draining(self) -> bool:
        return self.peers.draining

    @property
    def sample_rate(self) -> int:
        """Output sample rate in Hz."""
        rates = [info.info.get("sample_rate") for info in self.peers.of("decode")]
        return next((rate for rate in rates if rate), DEFAULT_SAMPLE_RATE)

    @property
    def checkpoint_speakers(self) -> list[str]:
        """Speakers stored in the checkpoint."""
        speakers = [info.info.get("speakers") for info in self.peers.of("encode")]
        return sorted(next((names for names in speakers if names), []))

    @property
    def takes_instructions(self) -> bool:
        """Whether the checkpoint was trained with instructions on how to speak."""
        return any(info.info.get("instructions") for info in self.peers.of("encode"))

    def knows_word_times(self, style: int) -> bool:
        """Whether the checkpoint names the attention heads that give word times (alignment_heads)."""
        info = self.peers.stages.get(("llm", style))
        return info is not None and bool(info.info.get("word_times"))

    def style_index(self, name: str) -> int:
        """Return the index of a `tts_model_name`; "default" is the first. Raises RequestError."""
        if name == "default":
            return 0
        for index, style in enumerate(self.styles):
            if style.name == name:
                return index
        known = ", ".join(["default", *(style.name for style in self.styles)])
        raise RequestError(400, f"unknown tts_model_name {name!r}; known are {known}")

    def admit(self, text: str, options: messages.SpeechOptions, remaining: float) -> Place:
        """Count one more active request with `remaining` seconds to its deadline; the caller must return the
        place to `admission`. Empty `text`: not known yet. Raises RequestError (429, 503)."""
        try:
            if self.draining:
                raise RequestError(503, "the server is shutting down", retry_after=5, refusal="draining")
            return self.admission.admit(expected_audio(text, options), remaining)
        except RequestError as error:
            refused_total.labels(error.refusal).inc()
            raise

    # -- called by SpeechCall

    def submit(self, call: Call) -> None:
        """Send the call's request to the stages, now or once they are up. Raises RequestError if a stage it
        needs has been given up."""
        reason = recovery.hindrance(call.request, self.peers)
        if reason:
            raise RequestError(503, reason)
        self._calls[call.request.request_id] = call
        self._try_to_send(call)

    def append(self, request: SpeechRequest, *parts: messages.Message) -> None:
        """Send more messages of a submitted bistream request to its encode process. A request not submitted
        yet already has them in its state."""
        if request.submitted:
            for message in parts:
                self._send_to_encode(request, message)

    def forget(self, call: Call) -> None:
        """Free everything that the stages hold for a call that has ended. May be called twice."""
        request = call.request
        if self._calls.pop(request.request_id, None) is None or not request.submitted:
            return
        if request.complete:
            self._send_to_encode(request, messages.Release(job=request.job))
        else:
            self.peers.broadcast(messages.Abort(job=request.job))

    # -- internal

    def _send_to_encode(self, request: SpeechRequest, message: messages.Message) -> None:
        self.peers.send("encode", request.encode_index(len(self.peers.of("encode"))), message)

    def _try_to_send(self, call: Call) -> None:
        request = call.request
        reason = recovery.hindrance(request, self.peers)
        if reason:
            call.fail(RequestError(503, reason))
        elif reason is None:
            request.submitted = True
            for message in request.submission(self._inbox.address):
                self._send_to_encode(request, message)

    def _recover(self, call: Call, why: str, after_loss: bool = False) -> None:
        request = call.request
        self.peers.broadcast(messages.Abort(job=request.job))
        request.start_attempt(after_loss)
        if request.fruitless_attempts >= recovery.MAX_FRUITLESS_ATTEMPTS:
            call.fail(RequestError(503, f"given up after {request.fruitless_attempts} attempts: {why}"))
            return
        log.warning("%s attempt %d: %s", request.request_id, request.attempt, why)
        request_recoveries_total.inc()
        self._try_to_send(call)

    def _draw_again(self, call: Call) -> None:
        """Retry with another seed, at most once per request; then fail it."""
        request = call.request
        if request.drawn_again:
            call.fail(
                RequestError(500, "the model produced no speech in two attempts: try another seed or text")
            )
            return
        log.warning(
            "%s no speech with seed %d; retrying with another seed",
            request.request_id,
            request.speech.options.seed,
        )
        self.peers.broadcast(messages.Abort(job=request.job))
        request.draw_again()
        self._try_to_send(call)

    async def _receive(self) -> None:
        while True:
            try:
                self._handle(await self._inbox.recv())
            except Exception:
                log.exception("failed to handle a message")

    def _handle(self, message: messages.Message) -> None:
        match message:
            case messages.AudioChunk() | messages.Encoded() | messages.Routed() | messages.Failed():
                call = self._calls.get(message.job.rpartition("/")[0])
                if call is not None and call.request.submitted and call.request.job == message.job:
                    self._handle_answer(call, message)
            case messages.Topology(worker_slot=slot):
                self.peers.apply(message)
                self.slot = slot
                self._active.clear(slot)
                self.admission = Admission(self.settings, self._active, self._rate, slot)
                self._connected.set()
            case messages.StageDown(stage=stage, index=index, incarnation=incarnation, in_work=in_work):
                self.peers.apply(message)
                self._handle_death(stage, index, incarnation, in_work)
            case messages.StageGivenUp(stage=stage, index=index):
                incarnation = self.peers.stages[stage, index].incarnation
                self.peers.apply(message)
                self._handle_death(stage, index, incarnation, [])
                self._send_waiting()
            case messages.StageUp():
                self.peers.apply(message)
                self._send_waiting()
            case _:
                self.peers.apply(message)

    def _handle_answer(self, call: Call, message: messages.Message) -> None:
        request = call.request
        match message:
            case messages.Encoded(text_tokens=count, words=words):
                request.text_tokens, request.words = count, words
            case messages.Routed():
                request.routed = message
                if recovery.routed_to_dead(message, self.peers):
                    self._recover(call, f"decode {message.decode} is gone")
            case messages.AudioChunk():
                try:
                    audio = request.take(message)
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
                    self.forget(call)
            case messages.Failed(retry=True, stage=stage, message=text):
                self._recover(call, f"{stage}: {text}", after_loss=True)
            case messages.Failed(stage=stage, code=code, message=text):
                if code >= 500:
                    log.error("%s failed in %s: %s", request.request_id, stage, text)
                call.fail(RequestError(code, text))

    def _handle_death(self, stage: str, index: int, incarnation: int, in_work: list[str]) -> None:
        """Retry or fail the requests affected by the death of a stage. `in_work`: the jobs it was
        processing.
        """
        encodes = len(self.peers.of("encode"))
        for call in list(self._calls.values()):
            if recovery.lost_with(call.request, stage, index, incarnation, encodes):
                request = call.request
                if request.job in in_work and request.note_strike(stage, alone=len(in_work) == 1):
                    log.error("%s is not retried: it made %s die", request.request_id, stage)
                    call.fail(
                        RequestError(
                            500, f"the {stage} stage died again while it processed only this request"
                        )
                    )
                else:
                    self._recover(call, f"{stage} {index} died")

    def _send_waiting(self) -> None:
        for call in list(self._calls.values()):
            if not call.request.submitted:
                self._try_to_send(call)
