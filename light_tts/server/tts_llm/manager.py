"""The LLM process of one style: takes `Generate`, hands speech tokens on to a decode process."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from light_tts.common.gpu import choose_device
from light_tts.common.sampling_rule import MAX_TOP_K, MAX_WIN_SIZE, SamplingRule
from light_tts.engine.llm.delivery import Delivery
from light_tts.engine.llm.engine import Engine, Work
from light_tts.engine.llm.llm_yield import Courtesy
from light_tts.engine.llm.options import EngineOptions
from light_tts.engine.llm.pace import Pace, choose_pace
from light_tts.engine.llm.scheduler import Limits, Scheduler
from light_tts.engine.llm.sequence import Bistream, OneShot, RequestError, Sequence
from light_tts.engine.speech.chunk_planner import ChunkPlanner
from light_tts.models.checkpoint.config import Config, load_config
from light_tts.models.llm.speech_lm import SpeechLM
from light_tts.server.core import messages, metrics
from light_tts.server.core.first_chunk_lock import choose_right_of_way
from light_tts.server.core.gone_workers import GoneWorkers
from light_tts.server.core.messages import Generate
from light_tts.server.core.pulse import INTERVAL
from light_tts.server.core.pulse import Pace as PulsePace
from light_tts.server.core.stage import StageContext
from light_tts.server.core.styles import load_styles
from light_tts.server.tts_llm.gpu_turn import GpuTurn
from light_tts.server.tts_llm.stats import Stats

OPENING = (
    "job", "reply_to", "part", "parts", "prompt", "speaker", "options", "stream", "progress", "alone_in"
)  # fmt: skip
TOMBSTONES = 4096  # jobs remembered after their end: messages of theirs may still be under way
STAGE = "llm"
SLOW_CPU = 0.1  # seconds for a token, before it is known
LOOK_AGAIN = 0.001  # seconds, while steps are held back; an inbox sleeps no shorter


def run(ctx: StageContext) -> None:
    """The process's life, until `Shutdown`."""
    stage = load(ctx)
    ctx.ready({"device": stage.device})
    while True:
        ctx.pulse.tick()
        for message in ctx.inbox.wait(stage.patience()):
            if isinstance(message, messages.Shutdown):
                return
            stage.receive(message)
        stage.step()


def load(ctx: StageContext) -> LLMStage:
    """The stage with its model. Raises CheckpointError, ConfigError, StyleError or DeviceError."""
    settings = ctx.settings
    model_dir = Path(settings.model_dir)
    config = load_config(model_dir)
    styles = load_styles(model_dir)
    device, dtype = choose_device(settings, 0)
    model = SpeechLM.from_checkpoint(model_dir, styles[ctx.index].llm_path, config, device, dtype)
    sampling = config.llm.sampling
    pace = choose_pace(settings, device)
    graphs = not settings.disable_cudagraph
    engine = Engine(
        model,
        EngineOptions(
            slots=settings.max_total_token_num,
            rows=settings.gpt_paral_num,
            max_len=min(settings.max_req_total_len, model.backbone.max_position_embeddings),
            window=max(sampling.win_size, MAX_WIN_SIZE),
            max_top_k=max(sampling.top_k, MAX_TOP_K),
            int8=settings.int8_kv,
            round_steps=pace.round_steps,
            graph_max_batch=settings.graph_max_batch_size if graphs else 0,
            graph_max_len=settings.graph_max_len_in_batch,
        ),
    )
    engine.warm_up()
    shared = len(styles) > 1 and device.type == "cuda"
    turn = GpuTurn(ctx.run_dir.root, settings.gpt_paral_step_num, engine.synchronize) if shared else None
    right_of_way = choose_right_of_way(ctx.run_dir.root, device)
    courtesy = None if right_of_way is None else Courtesy(right_of_way.taken)
    return LLMStage(ctx, config, model, engine, turn, pace, courtesy)


def sampling_rule(options: messages.SpeechOptions, default: SamplingRule) -> SamplingRule:
    """What the client chose, and the checkpoint's values for the rest."""
    chosen = {entry.name: getattr(options, entry.name) for entry in fields(SamplingRule)}
    return replace(default, **{name: value for name, value in chosen.items() if value is not None})


@dataclass(eq=False)
class Speaking:
    """A part under way."""

    request: Generate
    sequence: Sequence
    delivery: Delivery
    arrived: float
    opened: bool = False  # the decode process knows of it

    @property
    def urgent(self) -> bool:
        """Whether a stream needs a step at once: not all tokens of its first chunk are being drawn, or it has
        ids that the device does not know."""
        sequence = self.sequence
        if not (self.request.stream and sequence.runnable):
            return False
        return not sequence.on_device or self.undrawn > 0

    @property
    def undrawn(self) -> int:
        """How many tokens that its first chunk waits for are not even being drawn; none where it is not
        positive."""
        return self.delivery.missing - self.sequence.ahead

    @property
    def breaks_silence(self) -> bool:
        """Whether what is handed on next is the first that the client will hear."""
        unheard = self.request.part == 0 and not self.request.progress.samples
        return unheard and self.delivery.missing > 0


@dataclass
class Job:
    reply_to: str
    alone: bool = False  # its steps are taken without others
    decode: int | None = None  # its decode process, once it has one
    parts: dict[int, Speaking] = field(default_factory=dict)


class LLMStage:
    """Everything between two messages: jobs, the scheduler over their sequences, and the engine."""

    def __init__(
        self,
        ctx: StageContext,
        config: Config,
        model: SpeechLM,
        engine: Engine,
        turn: GpuTurn | None,
        pace: Pace,
        courtesy: Courtesy | None,
    ) -> None:
        settings = ctx.settings
        self._ctx = ctx
        self._config = config
        self._ids = model.ids
        self._engine = engine
        self._turn = turn
        self._ahead = pace.ahead
        self._courtesy = courtesy
        self.device = str(model.embedding.weight.device)
        self._busy_since = 0.0  # while launches are under way: since when nothing has been counted
        self._flights: deque[tuple[int, int, float]] = deque()  # of each launch: step, tokens, begin
        self._step_pace = PulsePace(0.0 if self.device.startswith("cuda") else SLOW_CPU)
        self._turn_number = 0  # counts steps while jobs must be worked on alone
        self._limit = min(settings.max_req_total_len, model.backbone.max_position_embeddings)
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
        self._jobs: dict[str, Job] = {}
        self._forgotten: OrderedDict[str, None] = OrderedDict()
        self._gone = GoneWorkers()
        self._next_decode = ctx.index  # so that styles begin at different decode processes
        self._stats = Stats(ctx.log, settings)

    def patience(self) -> float:
        """How long to wait for messages: not at all while a step may be begun or is under way; else, with the
        GPU left to others, a moment if steps are held back, and if there are none until the next beat."""
        if self._engine.in_flight:
            return 0
        held = self._gives_way()
        if self._scheduler.has_work and not held:
            return 0
        if self._turn is not None:
            self._turn.release()
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
        if request.progress.finished or request.job in self._forgotten or request.reply_to in self._gone:
            return
        job = self._jobs.setdefault(request.job, Job(request.reply_to, STAGE in request.alone_in))
        try:
            sequence = self._sequence(request)
        except RequestError as error:
            self._fail(request.job, 400, str(error))
            return
        job.parts[request.part] = Speaking(request, sequence, self._delivery(request), time.monotonic())
        self._scheduler.submit(sequence)
        self._ctx.log.debug("%s part %d to speak", request.job, request.part)

    def _sequence(self, request: Generate) -> Sequence:
        common = {
            "job": request.job,
            "part": request.part,
            "seed": request.options.seed,
            "ids": self._ids,
            "limit": self._limit,
            "sampling": sampling_rule(request.options, self._config.llm.sampling),
            "prompt_text": request.prompt_text_ids,
            "prompt_speech": request.prompt_speech_token.array(np.int32).tolist(),
            "forced": request.progress.tokens,
            "min_outputs": request.options.min_new_tokens,
            "max_outputs": request.options.max_new_tokens,
        }
        if not request.bistream:
            return OneShot(text=request.text_ids, longest=self._ctx.settings.max_part_tokens, **common)
        sequence = Bistream(mix=self._config.llm.mix_ratio, **common)
        sequence.append_text(request.text_ids)
        if sequence.error:
            raise RequestError(sequence.error)
        return sequence

    def _delivery(self, request: Generate) -> Delivery:
        planner = None
        if request.stream:
            hop = self._config.chunk_size
            max_hop = hop if self._ctx.settings.stream_hop == "fixed" else 4 * hop
            lookahead = self._config.flow.pre_lookahead_len
            planner = ChunkPlanner(request.flow_prompt_tokens, hop, lookahead, max_hop)
        return Delivery(planner, self._ids.speech_tokens)

    def _feed(self, name: str, feed: Callable[[Bistream], None]) -> None:
        """More text for a bistream job, or its end."""
        job = self._jobs.get(name)
        if job is None:
            return
        speaking = job.parts[0]
        try:
            feed(speaking.sequence)
        except RequestError as error:
            self._fail(name, 400, str(error))
            return
        if speaking.opened:
            self._hand_out(speaking)

    def _speaking(self, sequence: Sequence) -> Speaking:
        return self._jobs[sequence.job].parts[sequence.part]

    # ---- steps

    def _gives_way(self) -> bool:
        """Whether steps are held back now, for the sake of somebody's first chunk."""
        if self._courtesy is None:
            return False
        parts = [self._speaking(sequence) for sequence in self._scheduler.present]
        urgent = not self._scheduler.has_work or any(part.urgent for part in parts)
        coming = any(part.sequence.ahead and part.breaks_silence and self._shares_gpu(part) for part in parts)
        return self._courtesy.holds(urgent, coming)

    def _steps_to_first_chunk(self) -> int | None:
        """Steps until the last token that somebody's first chunk waits for is drawn: a round that went on
        would keep it from the decode process."""
        undrawn = (self._speaking(s).undrawn for s in self._scheduler.running if s.on_device)
        return min((steps for steps in undrawn if steps > 0), default=None)

    def _shares_gpu(self, speaking: Speaking) -> bool:
        """Whether the part's decode process is on this GPU."""
        decode = self._ctx.peers.stages["decode", self._jobs[speaking.request.job].decode]
        return decode.info.get("device") == self.device

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

    def _route(self, name: str, job: Job) -> bool:
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
        if self._turn is not None:
            self._turn.take(max(tokens for _, tokens in work) if work[0][0].on_device else 1)
        if not self._engine.in_flight:
            self._busy_since = time.monotonic()
        tokens = sum(tokens for _, tokens in work)
        allowance = self._step_pace.allowance(tokens)
        step = self._ctx.pulse.begin([sequence.job for sequence, _ in work], allowance)
        self._ctx.pulse.tick(allowance)
        begun = time.monotonic()
        try:
            self._engine.launch(work)
            self._flights.append((step, tokens, begun))
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
        step, tokens, begun = self._flights.popleft()
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
                job=request.job, part=request.part, tokens=tokens, final=sequence.finished
            )
            self._ctx.peers.send("decode", job.decode, due)
            self._ctx.log.debug("%s part %d: %d tokens to decode", request.job, request.part, len(tokens))
            if self._courtesy is not None and breaks_silence and self._shares_gpu(speaking):
                self._courtesy.expect()
        if sequence.finished:
            self._scheduler.end(sequence)
            self._engine.release(sequence)
            del job.parts[request.part]
            if request.part == request.parts - 1:
                del self._jobs[request.job]

    # ---- ends

    def _fail(self, name: str, code: int, reason: str) -> None:
        reply_to = self._jobs[name].reply_to
        self._forget(name)
        self._ctx.outbox.send(
            reply_to, messages.Failed(job=name, stage=self._ctx.stage, code=code, message=reason)
        )

    def _forget(self, name: str) -> None:
        """Free all the job holds; its messages that are still under way will be ignored."""
        self._remember(name)
        self._jobs.pop(name, None)
        for sequence in self._scheduler.abort(name):
            self._engine.release(sequence)

    def _remember(self, name: str) -> None:
        self._forgotten[name] = None
        if len(self._forgotten) > TOMBSTONES:
            self._forgotten.popitem(last=False)
