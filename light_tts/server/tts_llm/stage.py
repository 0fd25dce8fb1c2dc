"""What the LLM process does between two messages: takes `Generate`, hands speech tokens on to a decode
process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from light_tts.engine.llm.engine import LLMEngine, Work
from light_tts.engine.llm.llm_yield import LLMYield
from light_tts.engine.llm.pace import RoundPace
from light_tts.engine.llm.scheduler import Limits, Scheduler
from light_tts.engine.llm.sequence import Bistream, Sequence, SequenceError
from light_tts.server.core import messages, metrics
from light_tts.server.core.ended_jobs import EndedJobs
from light_tts.server.core.gone_workers import GoneWorkers
from light_tts.server.core.messages import Generate
from light_tts.server.core.pulse import INTERVAL, Pace
from light_tts.server.core.stage import StageContext
from light_tts.server.tts_llm.gpu_turn import GpuTurn
from light_tts.server.tts_llm.jobs import LLMJob, Speaking
from light_tts.server.tts_llm.parts import PartFactory
from light_tts.server.tts_llm.stats import Stats
from light_tts.server.tts_llm.word_times import WordTimes

OPENING = (
    "job", "reply_to", "part", "parts", "prompt", "speaker", "options", "stream", "progress", "alone_in"
)  # fmt: skip
STAGE = "llm"
SLOW_CPU = 0.1  # seconds for a token, before it is known
LOOK_AGAIN = 0.001  # seconds, while steps are held back; an inbox sleeps no shorter


class LLMStage:
    """Jobs, the scheduler over their sequences, and the engine. `gpu_turn`: of this process on a GPU that
    several styles share; `llm_yield`: when steps are held back for first chunks; None: never;
    `word_times`: None where the model does not tell."""

    def __init__(
        self,
        ctx: StageContext,
        engine: LLMEngine,
        parts: PartFactory,
        gpu_turn: GpuTurn | None,
        pace: RoundPace,
        llm_yield: LLMYield | None,
        word_times: WordTimes | None = None,
    ) -> None:
        settings = ctx.settings
        self._ctx = ctx
        self._engine = engine
        self._parts = parts
        self._gpu_turn = gpu_turn
        self._ahead = pace.ahead
        self._llm_yield = llm_yield
        self._word_times = word_times
        self.device = str(engine.device)
        self._busy_since = 0.0  # while launches are under way: since when nothing has been counted
        self._launches: deque[tuple[int, int, float]] = deque()  # step, tokens and begin of each
        self._step_pace = Pace(0.0 if self.device.startswith("cuda") else SLOW_CPU)
        self._turn_number = 0  # counts steps while jobs must be worked on alone
        self._scheduler = Scheduler(
            Limits(
                slots=settings.max_total_token_num,
                prefill_tokens=settings.prefill_tokens,
                running=settings.gpt_paral_num,
                alive=settings.alive_requests,
                steps_between_admissions=settings.router_max_wait_tokens,
                busy_ratio=settings.router_token_ratio,
                assumed_output=settings.router_max_new_token_len,
                round_steps=pace.round_steps,
            )
        )
        self._jobs: dict[str, LLMJob] = {}
        self._ended = EndedJobs()
        self._gone = GoneWorkers()
        self._next_decode = ctx.index  # so that styles begin at different decode processes
        self._stats = Stats(ctx.log, settings)

    @property
    def knows_word_times(self) -> bool:
        return self._word_times is not None

    def patience(self) -> float:
        """How long to wait for messages: not at all while a step may be begun or is under way; else, with the
        GPU left to others, a moment if steps are held back, and if there are none until the next beat."""
        if self._engine.in_flight:
            return 0
        held = self._gives_way()
        if self._scheduler.has_work and not held:
            return 0
        if self._gpu_turn is not None:
            self._gpu_turn.release()
        self._stats.update(self._scheduler)
        return LOOK_AGAIN if held else INTERVAL

    def receive(self, message: messages.Message) -> None:
        match message:
            case Generate():
                self._begin(message)
            case messages.AppendIds(job=name, ids=ids):
                self._feed(name, lambda sequence: sequence.append_text(ids))
            case messages.FinishIds(job=name):
                self._feed(name, Bistream.finish_text)
            case messages.Abort(job=name):
                self._forget(name)
            case messages.WorkerGone(address=address):
                self._gone.add(address)
                for name in [name for name, job in self._jobs.items() if job.reply_to == address]:
                    self._forget(name)
        self._ctx.peers.apply(message)

    def step(self) -> None:
        """Admit, begin the next steps; then look at the results of earlier ones, while these run. While the
        GPU is left to first chunks: look at results only."""
        if self._gives_way():
            if self._engine.in_flight:
                self._collect()
            return
        for sequence in self._scheduler.admit():
            self._open(self._speaking(sequence))
        suspects = any(job.alone for job in self._jobs.values())
        while suspects and self._engine.in_flight:
            self._collect()
        plan = self._scheduler.plan(self._steps_to_first_chunk(), self._whose_turn() if suspects else None)
        for sequence in plan.evicted:
            self._engine.release(sequence)
        if plan.work:
            self._launch(plan.work)
        elif self._engine.in_flight:
            self._collect()
        while self._engine.in_flight > (0 if suspects else self._ahead):
            self._collect()

    def _whose_turn(self) -> set[str]:
        """The jobs of the next step where some must be worked on alone: one of these, or all others."""
        jobs = dict.fromkeys(s.job for s in self._scheduler.running if s.runnable)
        alone = [{name} for name in jobs if self._jobs[name].alone]
        others = {name for name in jobs if not self._jobs[name].alone}
        turns = [others, *alone] if others or not alone else alone
        self._turn_number += 1
        return turns[self._turn_number % len(turns)]

    # ---- requests

    def _begin(self, request: Generate) -> None:
        if request.progress.finished or request.job in self._ended or request.reply_to in self._gone:
            return
        job = self._jobs.setdefault(request.job, LLMJob(request.reply_to, STAGE in request.alone_in))
        try:
            speaking = self._parts.make(request)
        except SequenceError as error:
            self._fail(request.job, 400, str(error))
            return
        job.parts[request.part] = speaking
        self._scheduler.submit(speaking.sequence)
        self._ctx.log.debug("%s part %d to speak", request.job, request.part)

    def _feed(self, name: str, feed: Callable[[Bistream], None]) -> None:
        """More text for a bistream job, or its end."""
        job = self._jobs.get(name)
        if job is None:
            return
        speaking = job.parts[0]
        try:
            feed(speaking.sequence)
        except SequenceError as error:
            self._fail(name, 400, str(error))
            return
        if speaking.opened:
            self._hand_out(speaking)

    def _speaking(self, sequence: Sequence) -> Speaking:
        return self._jobs[sequence.job].parts[sequence.part]

    # ---- steps

    def _gives_way(self) -> bool:
        """Whether steps are held back now, for the sake of somebody's first chunk."""
        if self._llm_yield is None:
            return False
        parts = [self._speaking(sequence) for sequence in self._scheduler.present]
        urgent = not self._scheduler.has_work or any(part.urgent for part in parts)
        coming = any(part.sequence.ahead and part.breaks_silence and self._shares_gpu(part) for part in parts)
        return self._llm_yield.holds(urgent, coming)

    def _steps_to_first_chunk(self) -> int | None:
        """Steps until the last token that somebody's first chunk waits for is drawn: a round that went on
        would keep it from the decode process."""
        undrawn = (self._speaking(s).undrawn for s in self._scheduler.running if s.on_device)
        return min((steps for steps in undrawn if steps > 0), default=None)

    def _shares_gpu(self, speaking: Speaking) -> bool:
        """Whether the part's decode process is on this GPU."""
        index = self._jobs[speaking.request.job].decode
        assert index is not None  # the part has been opened
        return self._ctx.peers.stages["decode", index].info.get("device") == self.device

    def _open(self, speaking: Speaking) -> None:
        """The part has been admitted: for the first time, or again after a pause."""
        request = speaking.request
        if not speaking.opened:
            job = self._jobs[request.job]
            if job.decode is None and not self._route(request.job, job):
                self._fail(request.job, 503, "no decode process is available")
                return
            shared = {name: getattr(request, name) for name in OPENING}
            self._ctx.peers.send("decode", job.decode, messages.OpenSpeech(**shared))
            speaking.opened = True
            metrics.stage_queue_seconds.labels("llm").observe(time.monotonic() - speaking.arrived)
        self._hand_out(speaking)

    def _route(self, name: str, job: LLMJob) -> bool:
        """Choose the job's decode process, in turn among those that are up; where all are being restarted,
        messages wait for one of these."""
        usable = [info for info in self._ctx.peers.of("decode") if info.state != "failed"]
        usable = [info for info in usable if info.state == "up"] or usable
        if not usable:
            return False
        chosen = next((info for info in usable if info.index >= self._next_decode), usable[0])
        self._next_decode = chosen.index + 1
        job.decode = chosen.index
        routed = messages.Routed(job=name, decode=chosen.index, incarnation=chosen.incarnation)
        self._ctx.outbox.send(job.reply_to, routed)
        return True

    def _launch(self, work: Work) -> None:
        """Where it fails each request is tried alone, so that only the one that is the cause fails; where the
        device itself has failed the process ends."""
        if self._gpu_turn is not None:
            self._gpu_turn.take(max(tokens for _, tokens in work) if work[0][0].on_device else 1)
        if not self._engine.in_flight:
            self._busy_since = time.monotonic()
        tokens = sum(tokens for _, tokens in work)
        allowance = self._step_pace.allowance(tokens)
        step = self._ctx.pulse.begin([sequence.job for sequence, _ in work], allowance)
        self._ctx.pulse.tick(allowance)
        begun = time.monotonic()
        try:
            self._engine.launch(work)
            self._launches.append((step, tokens, begun))
        except Exception:
            self._engine.check_device()
            self._ctx.pulse.end(step)
            while self._engine.in_flight:
                self._collect()
            again = self._engine.restart(work)
            if len(work) > 1:
                for item in again:
                    self._launch([item])
            elif again:
                name = again[0][0].job
                self._ctx.log.exception("%s: the language model failed", name)
                self._fail(name, 500, "the language model failed")

    def _collect(self) -> None:
        """Hand out the results of the oldest launch."""
        taken, steps = self._engine.collect()
        step, tokens, begun = self._launches.popleft()
        self._ctx.pulse.end(step)
        self._step_pace.observe(tokens, time.monotonic() - begun)
        for sequence, _ in taken:
            self._hand_out(self._speaking(sequence))
        now = time.monotonic()
        self._stats.add(sum(tokens for _, tokens in taken), steps, now - self._busy_since)
        self._stats.update(self._scheduler)
        self._busy_since = now

    def _hand_out(self, speaking: Speaking) -> None:
        """Send the tokens that are due, and forget the part if it is finished."""
        sequence, request = speaking.sequence, speaking.request
        if sequence.error:
            self._fail(request.job, 400, sequence.error)
            return
        job = self._jobs[request.job]
        breaks_silence = speaking.breaks_silence
        tokens = speaking.delivery.take(sequence.outputs, sequence.finished)
        if tokens is not None:
            due = messages.SpeechTokens(
                job=request.job,
                part=request.part,
                tokens=tokens,
                final=sequence.finished,
                times=self._times_of_words(speaking) if sequence.finished else [],
            )
            self._ctx.peers.send("decode", job.decode, due)
            self._ctx.log.debug("%s part %d: %d tokens to decode", request.job, request.part, len(tokens))
            if self._llm_yield is not None and breaks_silence and self._shares_gpu(speaking):
                self._llm_yield.expect()
        if sequence.finished:
            self._scheduler.end(sequence)
            self._engine.release(sequence)
            del job.parts[request.part]
            if request.part == request.parts - 1:
                del self._jobs[request.job]

    def _times_of_words(self, speaking: Speaking) -> list[int]:
        return [] if self._word_times is None else self._word_times.of(speaking)

    # ---- ends

    def _fail(self, name: str, code: int, reason: str) -> None:
        reply_to = self._jobs[name].reply_to
        self._forget(name)
        self._ctx.fail(name, reply_to, code, reason)

    def _forget(self, name: str) -> None:
        """Free all the job holds; its messages that are still under way will be ignored."""
        self._ended.add(name)
        self._jobs.pop(name, None)
        for sequence in self._scheduler.abort(name):
            self._engine.release(sequence)
