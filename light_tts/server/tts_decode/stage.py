"""The decode stage. One thread receives, schedules and sends; the engine's threads compute."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from light_tts.engine.speech.lanes import Lane, SpeechEngine, Task
from light_tts.engine.speech.part_speech import ChunkRules, Delivered, PartSpeech, PartTooLong
from light_tts.engine.speech.policy import DeadlinePolicy, Waiting
from light_tts.engine.speech.work_item import SpeechState
from light_tts.server.core import messages, metrics
from light_tts.server.core.ended_jobs import EndedJobs
from light_tts.server.core.first_chunk_lock import FirstChunkLock
from light_tts.server.core.gone_workers import GoneWorkers
from light_tts.server.core.heartbeat import INTERVAL, DurationBound
from light_tts.server.core.idle_recorder import IdleRecorder
from light_tts.server.core.stage import StageContext
from light_tts.server.tts_decode.jobs import DecodeJob, SpokenPart, has_chunk, work_item
from light_tts.server.tts_decode.voices import Voices

STAGE = "decode"
SLOW_CPU = 0.2  # seconds per token, assumed before it has been measured
# A first chunk is expected for this long (seconds) after its job was opened: later its text is probably not
# complete, so the language model is not at work on it.
FIRST_TOKENS = 0.2
POLL_SECONDS = 0.005  # seconds between checks while chunks wait for others


@dataclass(frozen=True)
class Started:
    """A batch in progress. step: its number in the heartbeat; bound: on its duration, for work counted in
    `tokens`; waited: seconds that each of its chunks did."""

    step: int
    bound: DurationBound
    tokens: int
    waited: list[float]


class DecodeStage:
    """Schedules the chunks of all jobs. `first_chunk_lock`: the lock for first chunks on this GPU, None on a
    CPU."""

    def __init__(
        self,
        ctx: StageContext,
        engine: SpeechEngine,
        voices: Voices,
        rules: ChunkRules,
        first_chunk_lock: FirstChunkLock | None,
    ) -> None:
        self._ctx = ctx
        self._engine = engine
        self._voices = voices
        self._rules = rules
        self._first_chunk_lock = first_chunk_lock
        self._policy = DeadlinePolicy(
            engine.model.sample_rate,
            time.monotonic,
            packed=engine.model.flow.packed,
            firsts_alone=first_chunk_lock is not None,
        )
        self._jobs: dict[str, DecodeJob] = {}
        self._ended = EndedJobs()  # ended early by an error or Abort
        self._gone = GoneWorkers()
        # Chunks of a stream cost less than their length suggests, so they have a bound of their own.
        self._bounds = {masked: DurationBound(0.0 if engine.on_gpu else SLOW_CPU) for masked in (False, True)}
        self._started: dict[int, Started] = {}  # by id of the batch
        self._gathers = False
        self._recorder = IdleRecorder(engine, ctx.run_dir.recording_lock, ctx.heartbeat, ctx.log)
        self._metrics = metrics.StageMetrics(STAGE)

    def patience(self) -> float:
        if self._gathers:
            return POLL_SECONDS
        return self._recorder.patience() if self._idle else INTERVAL

    def step(self) -> None:
        self._end_work()
        self._start_work()
        self._recorder.step(self._idle)

    @property
    def _idle(self) -> bool:
        return not self._jobs and self._engine.idle

    # -- messages

    def receive(self, message: messages.Message) -> None:
        match message:
            case messages.OpenSpeech(job=name) if name not in self._ended:
                self._open(message)
            case messages.SpeechTokens(job=name) if name in self._jobs:
                self._add_tokens(self._jobs[name], message)
            case messages.Abort(job=name):
                self._end_early(name)
            case messages.WorkerGone(address=address):
                self._gone.add(address)
                for job in [job for job in self._jobs.values() if job.reply_to == address]:
                    self._end_early(job.name)
                self._ctx.peers.apply(message)
            case _:
                self._ctx.peers.apply(message)

    def _open(self, message: messages.OpenSpeech) -> None:
        if message.reply_to in self._gone:
            return
        job = self._jobs.setdefault(
            message.job, DecodeJob(message.job, message.reply_to, STAGE in message.alone_in)
        )
        if message.stream and message.options.speed != 1.0:
            return self._fail(job, 400, "a speed other than 1 requires a response that is not streamed")
        if message.prompt is None:  # encode sends the checkpoint's own speakers as prompts, too
            return self._fail(job, 500, "the job has no prompt features")
        try:
            voice = self._voices.get(message.prompt)
        except FileNotFoundError:
            return self._fail(job, 503, "the features of the prompt are gone", retry=True)
        except Exception as error:  # a damaged segment or a lack of device memory fails only this job
            self._ctx.log.exception("%s: cannot load the prompt", job.name)
            return self._fail(job, 500, f"cannot load the prompt: {error}")
        if message.stream and not job.parts and (message.progress.samples or message.part):
            self._policy.resumed(job.name)
        delivered = Delivered(message.progress.tokens, message.progress.samples)
        speech = PartSpeech(self._rules, len(voice.speech_token), message.stream, delivered)
        state = SpeechState(voice, message.options.seed, message.part, message.options.speed)
        opened = time.monotonic()
        job.parts.append(SpokenPart(message.part, message.parts, speech, state, opened))

    def _add_tokens(self, job: DecodeJob, message: messages.SpeechTokens) -> None:
        part = next((part for part in job.parts if part.number == message.part), None)
        if part is None:
            return self._fail(job, 500, f"tokens of part {message.part}, which was not opened")
        waited = part.speech.step is None
        part.times, part.clock = message.times or part.times, message.clock
        try:
            part.speech.add(message.tokens, message.final)
        except PartTooLong as error:
            return self._fail(job, 400, str(error))
        if waited:
            part.since = time.monotonic()

    # -- scheduling

    def _start_work(self) -> None:
        chunks = [(job.busy, self._describe(job)) for job in self._jobs.values() if has_chunk(job)]
        waiting = [chunk for busy, chunk in chunks if not busy]
        in_work = [chunk for busy, chunk in chunks if busy]
        if self._first_chunk_lock is not None:
            self._first_chunk_lock.keep(self._policy.first_is_next(waiting, in_work))
        self._gathers = bool(waiting) and self._policy.gathers(waiting, self._first_chunks_coming())
        for lane in [] if self._gathers else list(self._engine.free_lanes):
            batch = self._next_batch(lane, waiting, in_work)
            if not batch:
                break
            self._start(lane, batch)
            waiting = [chunk for chunk in waiting if chunk not in batch]
            in_work += batch
        self._metrics.queue_depth.set(len(waiting))

    def _first_chunks_coming(self) -> int:
        """Return the number of first chunks whose tokens the language model is generating on this GPU."""
        device = str(self._engine.device)
        if self._first_chunk_lock is None or not any(
            llm.info.get("device") == device for llm in self._ctx.peers.of("llm")
        ):
            return 0
        since = time.monotonic() - FIRST_TOKENS
        return sum(self._is_coming(job, since) for job in self._jobs.values())

    def _is_coming(self, job: DecodeJob, since: float) -> bool:
        part = next(iter(job.parts), None)
        return (
            part is not None
            and part.speech.stream
            and part.speech.step is None
            and part.opened > since
            and self._policy.is_new(job.name)
        )

    def _next_batch(self, lane: Lane, waiting: list[Waiting], in_work: list[Waiting]) -> list[Waiting]:
        """Apply the policy. A job that must be alone waits until nothing is in progress, and nothing else
        starts until it has ended."""

        def alone(chunk: Waiting) -> bool:
            return self._jobs[chunk.job].alone

        if any(map(alone, in_work)):
            return []
        batch = self._policy.next_batch(waiting, self._engine.batch_limit, lane.urgent, in_work)
        if batch and alone(batch[0]):
            return batch[:1] if self._engine.idle else []
        return [chunk for chunk in batch if not alone(chunk)]

    def _start(self, lane: Lane, batch: list[Waiting]) -> None:
        bound, tokens = self._bounds[batch[0].masked], sum(chunk.tokens for chunk in batch)
        step = self._ctx.heartbeat.begin([chunk.job for chunk in batch], bound.allowance(tokens))
        tasks = [self._begin(self._jobs[chunk.job]) for chunk in batch]
        for chunk in batch:
            self._ctx.log.debug("%s part %d: chunk started", chunk.job, chunk.part)
        now = time.monotonic()
        self._started[id(tasks)] = Started(step, bound, tokens, [now - chunk.since for chunk in batch])
        self._engine.start(lane, tasks)

    def _end_work(self) -> None:
        for batch in self._engine.ended():
            for task, outcome in zip(batch.tasks, batch.outcomes, strict=True):
                self._hand_out(task.owner, outcome)
            self._policy.took(batch.seconds, len(batch.tasks))
            started = self._started.pop(id(batch.tasks))
            self._ctx.heartbeat.end(started.step)
            started.bound.observe(started.tokens, batch.seconds)
            self._metrics.work_seconds.observe(batch.seconds)
            metrics.decode_batch_size.observe(len(batch.tasks))
            for seconds in started.waited:
                self._metrics.queue_seconds.observe(seconds)

    def _describe(self, job: DecodeJob) -> Waiting:
        part = job.parts[0]
        item = work_item(part)
        return Waiting(
            job=job.name,
            since=part.since,
            stream=part.speech.stream,
            masked=self._engine.model.streaming(item),
            frames=self._engine.model.frames(item),
            tokens=part.speech.prompt_tokens + item.chunk.context_end,
            part=part.number,
        )

    def _begin(self, job: DecodeJob) -> Task:
        job.busy = True
        part = job.parts[0]
        part.begun = part.begun or time.monotonic()
        return Task(work_item(part), owner=job)

    # -- results

    def _hand_out(self, job: DecodeJob, outcome: np.ndarray | Exception) -> None:
        if self._jobs.get(job.name) is not job:
            return  # aborted in the meantime
        job.busy = False
        if isinstance(outcome, Exception):
            return self._fail_work(job, outcome)
        part = job.parts[0]
        step = part.speech.step
        assert step is not None  # its audio has just been generated
        if step.skip is not None:
            pcm = outcome[step.skip :]
            chunk = messages.AudioChunk(
                job=job.name,
                part=part.number,
                parts=part.parts,
                start=step.start,
                tokens=step.tokens,
                pcm=messages.Raw.of(pcm),
                final=step.chunk.final,
                times=part.times,
                clock=[*part.clock, part.begun, time.monotonic()] if step.chunk.final and part.clock else [],
            )
            self._ctx.outbox.send(job.reply_to, chunk)
            self._ctx.log.debug("%s part %d: %d samples sent", job.name, part.number, len(pcm))
            if part.speech.stream:
                self._policy.delivered(job.name, len(pcm))
        part.speech.advance()
        part.since = time.monotonic()
        if part.speech.done:
            job.parts.popleft()
            if job.parts:
                job.parts[0].since = time.monotonic()
            if part.number == part.parts - 1:
                self._forget(job.name)

    # -- errors

    def _fail_work(self, job: DecodeJob, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._ctx.log.error("%s does not fit in GPU memory: %s", job.name, error)
            self._fail(job, 503, "out of GPU memory")
        elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            # The next step may be the one that runs out: this process cannot continue.
            raise error
        else:
            self._ctx.log.error("%s failed", job.name, exc_info=error)
            self._fail(job, 500, f"{type(error).__name__}: {error}")

    def _fail(self, job: DecodeJob, code: int, reason: str, retry: bool = False) -> None:
        self._end_early(job.name)
        self._ctx.fail(job.name, job.reply_to, code, reason, retry)

    def _end_early(self, name: str) -> None:
        """Drop a job and any message of it still in flight; an Abort may even overtake the job itself."""
        self._forget(name)
        self._ended.add(name)

    def _forget(self, name: str) -> None:
        self._jobs.pop(name, None)
        self._policy.forget(name)
