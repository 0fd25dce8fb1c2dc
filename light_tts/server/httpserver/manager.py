"""HttpServerManager, one per HTTP worker: connects it to the other processes and knows their state."""

from __future__ import annotations

import asyncio
import os

from light_tts.common.cores import can_wait_awake
from light_tts.server.core import messages
from light_tts.server.core.channel import CallbackInbox, Outbox, Peers
from light_tts.server.core.counters import ActiveRequests, ServiceRate
from light_tts.server.core.metrics import refused_total
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.core.styles import Style
from light_tts.server.httpserver.admission import Admission, AdmittedRequest, expected_audio
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.submissions import Submissions
from light_tts.server.httpserver.tracing import Tracing

HELLO_TIMEOUT = 30.0  # seconds to wait for the supervisor's answer
DEFAULT_SAMPLE_RATE = 24_000


class HttpServerManager:
    """The HTTP worker's connection to the stages. Start and close it in the worker's event loop; all methods
    must be called from that loop."""

    def __init__(self, settings: Settings, run_dir: RunDir, styles: tuple[Style, ...]) -> None:
        self.settings = settings
        self.styles = styles
        self._run_dir = run_dir
        self._outbox = Outbox()
        self.peers = Peers(self._outbox)
        self.tracing: Tracing | None = None
        self.slot = -1  # this worker's slot in the shared counters
        self._connected = asyncio.Event()

    async def start(self) -> None:
        """Connect to the supervisor. Raises RuntimeError if it does not answer."""
        self._run_dir.register_process()
        if self.settings.otlp_endpoint:
            self.tracing = await asyncio.to_thread(Tracing, self.settings.otlp_endpoint)
        self._active = ActiveRequests(self._run_dir.shm)
        self._rate = ServiceRate(self._run_dir.shm)
        self._inbox = CallbackInbox(self._run_dir.worker_address())
        self.submissions = Submissions(self.peers, self._inbox.address, self._run_dir.shm)
        self._inbox.listen(self._handle)
        self._outbox.send(
            self._run_dir.supervisor, messages.WorkerHello(address=self._inbox.address, pid=os.getpid())
        )
        try:
            await asyncio.wait_for(self._connected.wait(), HELLO_TIMEOUT)
        except asyncio.TimeoutError:
            await self.close()
            raise RuntimeError(f"the supervisor did not answer within {HELLO_TIMEOUT:g} s") from None

    async def close(self) -> None:
        self.submissions.fail_all(503, "the server is shutting down")
        self._inbox.close()
        self._outbox.close(linger=0.2)
        self._active.close()
        self._rate.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

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
    def chunk_seconds(self) -> float | None:
        """Duration of a streaming chunk, or None if no encode process is ready yet."""
        return next((info.info["chunk_seconds"] for info in self.peers.of("encode") if info.info), None)

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

    def admit(
        self, text: str, options: messages.SpeechOptions, remaining: float, stream: bool
    ) -> AdmittedRequest:
        """Count one more active request with `remaining` seconds to its deadline; the caller must pass
        the result to `admission.leave`. Empty `text`: not known yet. Raises RequestError (429, 503)."""
        try:
            if self.draining:
                raise RequestError(503, "the server is shutting down", retry_after=5, refusal="draining")
            return self.admission.admit(expected_audio(text, options), remaining, stream)
        except RequestError as error:
            refused_total.labels(error.refusal).inc()
            raise

    def expect_request(self) -> None:
        """Tell encode and LLM that a request is being read, so that they stay awake for it. Only with a GPU
        and enough cores; the first audio then comes about 0.4 ms sooner."""
        on_gpu = any(info.info.get("device", "").startswith("cuda") for info in self.peers.of("llm"))
        if on_gpu and can_wait_awake():
            for info in [*self.peers.of("encode"), *self.peers.of("llm")]:
                if info.state == "up":
                    self._outbox.send(info.address, messages.Expect())

    # -- internal

    def _handle(self, message: messages.Message) -> None:
        match message:
            case messages.AudioChunk() | messages.Encoded() | messages.Routed() | messages.Failed():
                self.submissions.take(message)
            case messages.Topology(worker_slot=slot):
                self.peers.apply(message)
                self.slot = slot
                self._active.clear(slot)
                self.admission = Admission(self.settings, self._active, self._rate, slot)
                self._connected.set()
            case messages.StageDown(stage=stage, index=index, incarnation=incarnation, in_work=in_work):
                self.peers.apply(message)
                self.submissions.stage_died(stage, index, incarnation, in_work)
            case messages.StageGivenUp(stage=stage, index=index):
                incarnation = self.peers.stages[stage, index].incarnation
                self.peers.apply(message)
                self.submissions.stage_died(stage, index, incarnation, [])
                self.submissions.send_waiting()
            case messages.StageUp():
                self.peers.apply(message)
                self.submissions.send_waiting()
            case _:
                self.peers.apply(message)
