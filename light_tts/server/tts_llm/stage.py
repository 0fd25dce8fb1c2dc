"""The LLM stage: receives `Generate` and sends speech tokens to a decode process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from light_tts.engine.llm.bistream import Bistream
from light_tts.engine.llm.credit import Credit
from light_tts.engine.llm.engine import LLMEngine, Work
from light_tts.engine.llm.llm_yield import LLMYield
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.options import PREFILL_REQUESTS
from light_tts.engine.llm.pace import RoundPace
from light_tts.engine.llm.scheduler import Limits, Scheduler
from light_tts.engine.llm.sequence import Sequence, SequenceError
from light_tts.engine.speech.policy import ENOUGH_AUDIO
from light_tts.server.core import messages, metrics
from light_tts.server.core.ended_jobs import EndedJobs
from light_tts.server.core.gone_workers import GoneWorkers
from light_tts.server.core.heartbeat import INTERVAL, DurationBound
from light_tts.server.core.idle_recorder import IdleRecorder
from light_tts.server.core.messages import Generate
from light_tts.server.core.stage import StageContext
from light_tts.server.tts_llm.gpu_turn import GpuTurn
from light_tts.server.tts_llm.jobs import LLMJob, Speaking
from light_tts.server.tts_llm.parts import PartFactory
from light_tts.server.tts_llm.reading import Reading
from light_tts.server.tts_llm.stats import Stats

OPENING = (
    "job", "reply_to", "part", "parts", "prompt", "speaker", "options", "stream", "progress", "alone_in"
)  # fmt: skip
STAGE = "llm"
SLOW_CPU = 0.1  # seconds per token, assumed before it has been measured
# While tokens of first chunks are sampled on a GPU, steps leave out streams whose clients have ENOUGH_AUDIO:
# for LONGEST_LEFT_OUT seconds at a time, and a fifth of the time at most. Left out for longer, streams would
# come near the end of their audio, and decode would speak their chunks before first ones.
LONGEST_LEFT_OUT, REGAINED = 0.1, 0.25
POLL_SECONDS = 0.001  # seconds between checks while steps are held back; the shortest sleep of an inbox


class LLMStage:
    """Jobs, the scheduler of their sequences, and the engine. `gpu_turn`: used if several styles share this
    GPU; `llm_yield`: decides when steps are held back for first chunks, None: never; `reading`: None if the
    model does not support it."""

    def __init__(
        self,
        ctx: StageContext,
        engine: LLMEngine,
        parts: PartFactory,
        gpu_turn: GpuTurn | None,
        pace: RoundPace,
        llm_yield: LLMYield | None,
        reading: Reading | None = None,
    ) -> None:
        settings = ctx.settings
        self._ctx = ctx
        self._engine = engine
        self._parts = parts
        self._gpu_turn = gpu_turn
        self._ahead = pace.ahead
        self._llm_yield = llm_yield
        self._left_out = Credit(LONGEST_LEFT_OUT, REGAINED)
        self._reading = reading
        self.device = str(engine.device)
        self._busy_since = 0.0  # time of the last count while launches are in progress
        # step, number of tokens and start time of each
        self._launches: deque[tuple[int, int, float]] = deque()
        self._step_bound = DurationBound(0.0 if self.device.startswith("cuda") else SLOW_CPU)
        self._turn_number = 0  # counts steps while some jobs must run alone
        self._scheduler = Scheduler(
            Limits(
                slots=settings.max_total_token_num,
                prefill_tokens=settings.batch_max_tokens,
                prefill_requests=PREFILL_REQUESTS,
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
        self._next_decode = ctx.index  # so that styles start with different decode processes
        # address and message: about parts just admitted, sent while their first step runs
        self._announcements: list[tuple[str, messages.Message]] = []
        self._recorder = IdleRecorder(engine, ctx.run_dir.recording_lock, ctx.heartbeat, ctx.log)
        self._metrics = metrics.StageMetrics(STAGE)
        self._stats = Stats(self._metrics, ctx.log, settings)

    @property
    def knows_word_times(self) -> bool:
        return self._reading is not None

    def patience(self) -> float:
        """Seconds to wait for messages: none while a step can start or is in progress. Otherwise, after
        releasing the GPU, a moment if steps are held back or graphs are left to record, else until the next
        heartbeat."""
        if self._engine.in_flight:
            return 0
        held = self._must_yield()
        if self._scheduler.has_work and not held:
            return 0
        if self._gpu_turn is not None:
            self._gpu_turn.release()
        self._stats.update(self._scheduler)
        if held:
            return POLL_SECONDS
        return INTERVAL if self._jobs else self._recorder.patience()

    def receive(self, message: messages.Message) -> None:
        match message:
            case Generate():
                self._begin(message)
            case messages.AppendIds(job=name, ids=ids, words=words):
                if name in self._jobs:
                    self._jobs[name].parts[0].words = words
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
        """Admit requests and launch the next steps, then process results of earlier ones while these run.
        While the GPU is left to first chunks, only process results. Without any job, record a CUDA graph."""
        self._work()
        self._recorder.step(idle=not self._jobs and not self._engine.in_flight)

    def _work(self) -> None:
        if self._must_yield():
            if self._engine.in_flight:
                self._collect()
            return
        for sequence in self._scheduler.admit():
            self._open(self._speaking(sequence))
        suspects = any(job.alone for job in self._jobs.values())
        while suspects and self._engine.in_flight:
            self._collect()
        chosen = self._jobs_in_turn() if suspects else self._jobs_in_need()
        plan = self._scheduler.plan(self._steps_to_first_chunk(), chosen)
        for sequence in plan.evicted:
            self._engine.release(sequence)
        if plan.work:
            self._launch(plan.work)
        elif self._engine.in_flight:
            self._collect()
        self._announce()
        while self._engine.in_flight > (0 if suspects else self._ahead):
            self._collect()

    def _jobs_in_need(self) -> set[str] | None:
        """Return the jobs of the next step, None: all. A step with fewer rows is faster, and those left out
        later share steps with the others."""
        if self._llm_yield is None:
            return None
        enough = time.monotonic() + ENOUGH_AUDIO
        parts = [self._speaking(sequence) for sequence in self._scheduler.running]
        needy = [
            part for part in parts if not part.request.stream or self._jobs[part.request.job].dry_at < enough
        ]
        wanted = len(needy) < len(parts) and any(part.urgent for part in needy)
        return {part.request.job for part in needy} if self._left_out.holds(wanted) else None

    def _jobs_in_turn(self) -> set[str]:
        """Return the jobs of the next step if some must run alone: one of those, or all the others."""
        jobs = dict.fromkeys(s.job for s in self._scheduler.running if s.runnable)
        alone = [{name} for name in jobs if self._jobs[name].alone]
        others = {name for name in jobs if not self._jobs[name].alone}
        turns = [others, *alone] if others or not alone else alone
        self._turn_number += 1
        return turns[self._turn_number % len(turns)]

    # -- requests

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
        """Add text to a bistream job, or end its text."""
        job = self._jobs.get(name)
        if job is None:
            return
        speaking = job.parts[0]
        assert isinstance(speaking.sequence, Bistream)  # its first message said so
        try:
            feed(speaking.sequence)
        except SequenceError as error:
            self._fail(name, 400, str(error))
            return
        if speaking.opened:
            self._hand_out(speaking)

    def _speaking(self, sequence: Sequence) -> Speaking:
        return self._jobs[sequence.job].parts[sequence.part]

    # -- steps

    def _must_yield(self) -> bool:
        """Return whether steps are held back in favour of a first chunk."""
        if self._llm_yield is None:
            return False
        parts = [self._speaking(sequence) for sequence in self._scheduler.present]
        urgent = not self._scheduler.has_work or any(part.urgent for part in parts)
        coming = any(part.sequence.ahead and part.is_first_audio and self._shares_gpu(part) for part in parts)
        return self._llm_yield.holds(urgent, coming)

    def _steps_to_first_chunk(self) -> int | None:
        """Return the number of steps until the last token of some first chunk is sampled; a longer round
        would delay it. None if there is no such chunk."""
        unsampled = (self._speaking(s).unsampled for s in self._scheduler.running if s.on_device)
        return min((steps for steps in unsampled if steps > 0), default=None)

    def _shares_gpu(self, speaking: Speaking) -> bool:
        """Return whether the part's decode process uses this GPU."""
        index = self._decode_process(speaking)
        return self._ctx.peers.stages["decode", index].info.get("device") == self.device

    def _decode_process(self, speaking: Speaking) -> int:
        """That of the part, which has been opened."""
        index = self._jobs[speaking.request.job].decode
        assert index is not None
        return index

    def _open(self, speaking: Speaking) -> None:
        """Handle the admission of a part, either the first one or after a pause."""
        request = speaking.request
        if not speaking.opened:
            job = self._jobs[request.job]
            if job.decode is None and not self._route(request.job, job):
                self._fail(request.job, 503, "no decode process is available")
                return
            shared = {name: getattr(request, name) for name in OPENING}
            address = self._ctx.peers.stages["decode", self._decode_process(speaking)].address
            self._announcements.append((address, messages.OpenSpeech(**shared)))
            speaking.opened = True
            speaking.admitted = time.monotonic()
            self._metrics.queue_seconds.observe(speaking.admitted - speaking.arrived)
        self._hand_out(speaking)

    def _route(self, name: str, job: LLMJob) -> bool:
        """Choose the job's decode process, round-robin among those that are up. If all are being restarted,
        messages wait for one of those. Return False if there is none."""
        usable = [info for info in self._ctx.peers.of("decode") if info.state != "failed"]
        usable = [info for info in usable if info.state == "up"] or usable
        if not usable:
            return False
        chosen = next((info for info in usable if info.index >= self._next_decode), usable[0])
        self._next_decode = chosen.index + 1
        job.decode = chosen.index
        routed = messages.Routed(job=name, decode=chosen.index, incarnation=chosen.incarnation)
        self._announcements.append((job.reply_to, routed))
        return True

    def _announce(self) -> None:
        """Send the announcements that are due. Nothing else about their parts may be sent before."""
        for address, message in self._announcements:
            self._ctx.outbox.send(address, message)
        self._announcements.clear()

    def _launch(self, work: Work) -> None:
        """Launch a step. If it fails, retry each request alone, so that only the one responsible fails; if
        the device itself has failed, end the process."""
        if self._gpu_turn is not None:
            self._gpu_turn.take(max(tokens for _, tokens in work) if work[0][0].on_device else 1)
        if not self._engine.in_flight:
            self._busy_since = time.monotonic()
        tokens = sum(tokens for _, tokens in work)
        allowance = self._step_bound.allowance(tokens)
        step = self._ctx.heartbeat.begin([sequence.job for sequence, _ in work], allowance)
        self._ctx.heartbeat.tick(allowance)
        urgent = any(self._speaking(sequence).unsampled > 0 for sequence, _ in work)
        begun = time.monotonic()
        try:
            self._engine.launch(work, urgent)
            self._launches.append((step, tokens, begun))
        except Exception:
            self._engine.check_device()
            self._ctx.heartbeat.end(step)
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
        """Process the results of the oldest launch."""
        taken, steps = self._engine.collect()
        ended = time.monotonic()
        for sequence, _ in taken:
            self._hand_out(self._speaking(sequence))
        step, tokens, begun = self._launches.popleft()
        self._ctx.heartbeat.end(step)
        self._step_bound.observe(tokens, ended - begun)
        now = time.monotonic()
        self._stats.add(sum(tokens for _, tokens in taken), steps, now - self._busy_since)
        self._stats.update(self._scheduler)
        self._busy_since = now

    def _hand_out(self, speaking: Speaking) -> None:
        """Send the tokens that are due, and remove the part if it is finished."""
        sequence, request = speaking.sequence, speaking.request
        if sequence.error:
            self._fail(request.job, 400, sequence.error)
            return
        if self._reading is not None and (misreading := self._reading.wrong(speaking)):
            self._retry_with_next_seed(speaking, misreading)
            return
        job = self._jobs[request.job]
        is_first_audio = speaking.is_first_audio
        tokens = speaking.delivery.take(sequence.outputs, sequence.finished)
        if tokens is not None:
            self._announce()
            due = messages.SpeechTokens(
                job=request.job,
                part=request.part,
                tokens=tokens,
                final=sequence.finished,
                times=self._times_of_words(speaking),
                clock=speaking.clock if sequence.finished and request.options.traced else [],
            )
            self._ctx.peers.send("decode", self._decode_process(speaking), due)
            self._ctx.log.debug("%s part %d: %d tokens to decode", request.job, request.part, len(tokens))
            job.sent(len(tokens) * self._parts.token_seconds)
            if self._llm_yield is not None and is_first_audio and self._shares_gpu(speaking):
                self._llm_yield.expect()
        if sequence.finished:
            self._scheduler.end(sequence)
            self._engine.release(sequence)
            del job.parts[request.part]
            if request.part == request.parts - 1:
                del self._jobs[request.job]

    def _times_of_words(self, speaking: Speaking) -> list[int]:
        return [] if self._reading is None else self._reading.times(speaking)

    def _retry_with_next_seed(self, speaking: Speaking, reason: str) -> None:
        """Once for a part, before anything of it is handed on: it keeps its turn in the scheduler."""
        sequence, request = speaking.sequence, speaking.request
        assert isinstance(sequence, OneShot)  # text that is still arriving is not read
        self._ctx.log.warning(
            "%s part %d: words %s with seed %d; drawn again", request.job, request.part, reason, sequence.seed
        )
        metrics.redrawn_total.labels(reason).inc()
        self._engine.release(sequence)
        sequence.retry_with_next_seed()
        speaking.delivery = self._parts.delivery(request)
        speaking.next_seed_tried, speaking.share = True, None

    # -- errors

    def _fail(self, name: str, code: int, reason: str) -> None:
        reply_to = self._jobs[name].reply_to
        self._forget(name)
        self._announce()
        self._ctx.fail(name, reply_to, code, reason)

    def _forget(self, name: str) -> None:
        """Free everything the job holds; messages of it still in flight will be ignored."""
        self._ended.add(name)
        self._jobs.pop(name, None)
        for sequence in self._scheduler.abort(name):
            self._engine.release(sequence)
