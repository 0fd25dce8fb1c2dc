"""The encode stage.

Messages are handled sequentially in one thread, and a thread pool does the work. One more thread encodes
bistream text, so that it does not wait for recordings. A job is in progress from its admission until its
`Generate` messages have been sent; its prompt stays pinned until `Release`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import msgspec
import numpy as np

from light_tts.common.audio import AudioError, check_length
from light_tts.common.instructions import MisplacedMark
from light_tts.common.prompt_features import PromptFeatures
from light_tts.common.speakable import can_become_speakable
from light_tts.models.frontend.frontend import Frontend
from light_tts.models.frontend.prompt_text import PromptText
from light_tts.models.frontend.text_groups import MAX_GROUP
from light_tts.models.frontend.text_stream import TextStream
from light_tts.server.core import messages, metrics
from light_tts.server.core.gone_workers import GoneWorkers
from light_tts.server.core.heartbeat import INTERVAL, DurationBound
from light_tts.server.core.prompt_cache import CachedPrompt, SharedSpeechCache
from light_tts.server.core.stage import StageContext
from light_tts.server.tts_encode.jobs import STAGE, EncodeJob, PromptGone, TextError

T = TypeVar("T")


class EncodeStage:
    def __init__(
        self, ctx: StageContext, frontend: Frontend, pool: ThreadPoolExecutor, texts: ThreadPoolExecutor
    ) -> None:
        """`pool` processes recordings, `texts` processes texts, with one thread for each job that can be in
        progress."""
        self._ctx = ctx
        self._frontend = frontend
        self._pool = pool
        self._texts = texts
        self._cache = SharedSpeechCache(ctx.run_dir.shm, ctx.index, ctx.settings.cache_capacity, pool)
        self._jobs: dict[str, EncodeJob] = {}
        self._waiting: dict[str, EncodeJob] = {}  # not admitted yet, oldest first
        self._working: dict[str, EncodeJob] = {}  # admitted, Generate not sent yet
        self._gone = GoneWorkers()
        self._text_bound = DurationBound(first=0.002, base=500.0)  # per character
        self._prompt_bound = DurationBound(first=1.0, base=5.0)  # per second of a recording
        self._progressed: deque[EncodeJob] = deque()  # appended to by the pool's threads
        self._text_in_turn = ThreadPoolExecutor(1, thread_name_prefix=f"{STAGE}-text")
        self._closed = False
        self._wake_lock = threading.Lock()
        self._metrics = metrics.StageMetrics(STAGE)

    def patience(self) -> float:
        return INTERVAL

    def step(self) -> None:
        self._hand_on_encoded()
        self._admit()
        self._hand_on_encoded()  # jobs that needed no thread
        self._metrics.queue_depth.set(len(self._waiting))

    def close(self) -> None:
        """Stop using the inbox: results of work still in progress are dropped."""
        with self._wake_lock:
            self._closed = True
        self._text_in_turn.shutdown(wait=False, cancel_futures=True)

    # -- messages

    def receive(self, message: messages.Message) -> None:
        match message:
            case messages.Synthesize(job=name, reply_to=address):
                if address in self._gone:
                    return  # it would never be released
                self._ctx.log.debug("%s to encode", name)
                stream = self._frontend.text_stream() if message.bistream else None
                self._jobs[name] = self._waiting[name] = EncodeJob(message, time.monotonic(), stream=stream)
            case messages.AppendText(job=name, text=text) if name in self._jobs:
                self._guarded(self._jobs[name], lambda job: self._append_text(job, text))
            case messages.FinishText(job=name) if name in self._jobs:
                self._guarded(self._jobs[name], self._finish_text)
            case messages.Release(job=name) | messages.Abort(job=name):
                self._forget(name)
            case messages.WorkerGone(address=address):
                self._gone.add(address)
                for job in list(self._jobs.values()):
                    if job.request.reply_to == address:
                        self._forget(job.name)
                self._ctx.peers.apply(message)
            case _:
                self._ctx.peers.apply(message)

    def _append_text(self, job: EncodeJob, text: str) -> None:
        if job.stream is None or job.text_finished:
            raise TextError("text after the end of the text")
        self._encode_piece(job, len(text), lambda stream: stream.append(text))

    def _finish_text(self, job: EncodeJob) -> None:
        if job.stream is None or job.text_finished:
            raise TextError("the end of the text was sent twice")
        job.text_finished = True
        self._encode_piece(job, MAX_GROUP, TextStream.finish)

    def _encode_piece(self, job: EncodeJob, length: int, encode: Callable[[TextStream], list[int]]) -> None:
        """Encode the text of all bistream jobs in order of arrival."""

        stream = job.stream
        assert stream is not None

        def work() -> list[int]:
            with self._ctx.heartbeat.step(job.name, self._text_bound, length):
                return encode(stream)

        piece = self._text_in_turn.submit(work)
        job.encodings.append(piece)
        piece.add_done_callback(lambda _: self._on_progress(job))

    # -- scheduling

    def _admit(self) -> None:
        """Start waiting jobs. Jobs with long and with short texts are limited separately. A job that must be
        processed alone starts when nothing is in progress, and nothing starts beside it."""
        limit = self._ctx.settings.encode_paral_num
        working = Counter(job.long for job in self._working.values())
        for name, job in list(self._waiting.items()):
            if self._working and any(other.alone for other in (job, *self._working.values())):
                return
            if working[job.long] < limit:
                working[job.long] += 1
                self._working[name] = self._waiting.pop(name)
                job.started = time.monotonic()
                self._metrics.queue_seconds.observe(job.started - job.arrived)
                self._guarded(job, self._start)

    def _start(self, job: EncodeJob) -> None:
        job.request = self._separated(job.request)
        job.prompt, known = self._features(job.request)
        (metrics.prompt_cache_hits_total if known else metrics.prompt_cache_misses_total).inc()
        job.texts = self._encoded_texts(job)
        pending = [future for future in (job.prompt, job.texts) if not future.done()]
        for future in pending:
            future.add_done_callback(lambda _: self._on_progress(job))
        if not pending:
            self._progressed.append(job)

    def _separated(self, request: messages.Synthesize) -> messages.Synthesize:
        """Return the request with the beginning of its text in the prompt text if it belongs there. Raises
        MisplacedMark."""
        text, prompt_text = self._frontend.separated(request.text, request.prompt.text)
        if text == request.text:
            return request
        prompt = msgspec.structs.replace(request.prompt, text=prompt_text)
        return msgspec.structs.replace(request, text=text, prompt=prompt)

    def _encoded_texts(self, job: EncodeJob) -> Future[tuple[list[list[int]], PromptText]]:
        """Encode the texts, in a thread unless that would take longer than the work itself."""
        request = job.request
        if job.long or not self._frontend.at_once(request.text, request.prompt.text):
            return self._texts.submit(self._encode_texts, job)
        done: Future[tuple[list[list[int]], PromptText]] = Future()
        try:
            done.set_result(self._encode_texts(job))
        except Exception as error:
            done.set_exception(error)
        return done

    def _on_progress(self, job: EncodeJob) -> None:
        self._progressed.append(job)
        with self._wake_lock:
            if not self._closed:
                self._ctx.inbox.wake()

    def _features(self, request: messages.Synthesize) -> tuple[Future[CachedPrompt], bool]:
        prompt = request.prompt
        if prompt.speaker:
            if prompt.speaker not in self._frontend.speakers:
                raise TextError(f"unknown speaker {prompt.speaker!r}")
            key = hashlib.sha256(f"speaker {prompt.speaker}".encode()).hexdigest()
            return self._cache.get_or_compute(
                key, request.job, lambda: self._frontend.speakers[prompt.speaker].features
            )
        if not prompt.key:
            raise TextError("the request has neither a speaker nor a prompt recording")
        return self._cache.get_or_compute(prompt.key, request.job, lambda: self._compute_features(request))

    def _compute_features(self, request: messages.Synthesize) -> PromptFeatures:
        prompt, settings = request.prompt, self._ctx.settings
        if prompt.audio is None:
            raise PromptGone("the features of the prompt have been evicted")
        samples = prompt.audio.array(np.float32)
        check_length(
            len(samples), prompt.sample_rate, settings.min_prompt_seconds, settings.max_prompt_seconds
        )
        seconds = len(samples) / prompt.sample_rate
        with self._ctx.heartbeat.step(request.job, self._prompt_bound, seconds):
            features = self._frontend.features(samples, prompt.sample_rate)
        if not len(features.speech_token):
            raise AudioError("the audio is too short for speech tokens")
        return features

    def _encode_texts(self, job: EncodeJob) -> tuple[list[list[int]], PromptText]:
        length = len(job.request.text) + len(job.request.prompt.text)
        with self._ctx.heartbeat.step(job.name, self._text_bound, length):
            return self._split_text(job)

    def _split_text(self, job: EncodeJob) -> tuple[list[list[int]], PromptText]:
        request, prompt = job.request, job.request.prompt

        def wanted() -> bool:
            return not job.forgotten

        prompt_text = (
            self._frontend.speaker_prompt_text(prompt.text, prompt.speaker)
            if prompt.speaker
            else self._frontend.prompt_text(prompt.text, wanted)
        )
        if not request.bistream and not can_become_speakable(request.text):
            raise TextError("the text contains nothing to speak")
        parts = [[]] if request.bistream else self._frontend.split_text(request.text, wanted)
        if not parts:
            raise TextError("the text contains nothing to speak")
        return parts, prompt_text

    # -- results

    def _hand_on_encoded(self) -> None:
        while self._progressed:
            job = self._progressed.popleft()
            if self._jobs.get(job.name) is job:
                self._guarded(job, self._hand_on)

    def _hand_on(self, job: EncodeJob) -> None:
        if job.encoded and job.name in self._working:
            del self._working[job.name]
            self._metrics.work_seconds.observe(time.monotonic() - job.started)
            _result(job.prompt)  # report an error in the prompt first
            _result(job.texts)
            if job.stream is None:
                self._send_parts(job)
        if job.stream is not None and not job.text_sent:
            self._hand_on_text(job)

    def _hand_on_text(self, job: EncodeJob) -> None:
        """Send the available text of a bistream job; the Generate goes with the first piece."""
        pieces = job.encodings
        while pieces and pieces[0].done():
            job.unsent_ids += pieces.popleft().result()
        ended = job.text_finished and not pieces
        if ended and not job.sent and not job.unsent_ids:
            raise TextError("the text is empty")
        if not job.encoded or job.name in self._working or not (job.unsent_ids or ended):
            return
        style = job.request.style
        if not job.sent:
            self._send_parts(job)
        if job.unsent_ids:
            words = self._words_so_far(job) if job.request.options.word_times else []
            message = messages.AppendIds(job=job.name, ids=job.unsent_ids, words=words)
            self._ctx.peers.send("llm", style, message)
            job.unsent_ids = []
        if ended:
            self._ctx.peers.send("llm", style, messages.FinishIds(job=job.name))
            job.text_sent = True

    def _words_so_far(self, job: EncodeJob) -> list[int]:
        """Return the number of ids of each word, including the ids about to be sent, and send the words to
        the HTTP worker."""
        ids = job.last_word + job.unsent_ids
        job.words[-1:] = self._frontend.words(ids)
        job.last_word = ids[-job.words[-1][1] :]
        counts = [count for _, count in job.words]
        texts = [word for word, _ in job.words]
        encoded = messages.Encoded(job=job.name, text_tokens=sum(counts), words=[texts])
        self._ctx.outbox.send(job.request.reply_to, encoded)
        return counts

    def _send_parts(self, job: EncodeJob) -> None:
        request, cached = job.request, _result(job.prompt)
        parts, prompt_text = _result(job.texts)
        wanted = request.options.word_times
        read = wanted or (self._reads_words(request.style) and not request.bistream)
        words = [self._frontend.words(ids) for ids in parts] if read else []
        speech_token = cached.features.speech_token
        reference = messages.PromptRef(key=cached.key, owner=self._ctx.index, segment=cached.segment)
        for index, text_ids in enumerate(parts):
            progress = request.progress[index] if index < len(request.progress) else messages.PartProgress()
            if progress.finished:
                continue
            generate = messages.Generate(
                job=request.job,
                reply_to=request.reply_to,
                part=index,
                parts=len(parts),
                prompt_text_ids=prompt_text.ids,
                leading_ids=prompt_text.leading,
                text_ids=text_ids,
                prompt_speech_token=messages.Raw.of(
                    speech_token if prompt_text.with_speech else speech_token[:0]
                ),
                flow_prompt_tokens=len(speech_token),
                prompt=reference,
                speaker=request.prompt.speaker,
                options=request.options,
                stream=request.stream,
                bistream=request.bistream,
                progress=progress,
                alone_in=request.alone_in,
                words=[ids for _, ids in words[index]] if words else [],
            )
            self._ctx.peers.send("llm", request.style, generate)
            job.sent = True
        if not job.sent:
            raise RuntimeError("every part of the job is already finished")
        if not request.bistream and (wanted or request.options.report or request.options.traced):
            texts = [[word for word, _ in part] for part in words] if wanted else []
            encoded = messages.Encoded(job=request.job, text_tokens=sum(map(len, parts)), words=texts)
            self._ctx.outbox.send(request.reply_to, encoded)
        # The recording is no longer needed, but the job stays here until it is released.
        job.request = msgspec.structs.replace(request, prompt=messages.Prompt(), text="", progress=[])
        self._ctx.log.debug("%s encoded: %d parts", request.job, len(parts))

    def _reads_words(self, style: int) -> bool:
        """Whether the LLM of this style checks parts for skipped and repeated words."""
        llm = self._ctx.peers.stages["llm", style].info
        return self._ctx.settings.redraw_misread and llm.get("word_times", True)

    # -- errors

    def _guarded(self, job: EncodeJob, step: Callable[[EncodeJob], None]) -> None:
        """Run one step of a job; an exception fails only this job."""
        try:
            step(job)
        except (TextError, AudioError, MisplacedMark) as error:
            self._fail(job, 400, str(error))
        except PromptGone as error:
            self._fail(job, 503, str(error), retry=True)
        except Exception as error:
            self._ctx.log.exception("%s failed", job.name)
            self._fail(job, 500, f"{type(error).__name__}: {error}")

    def _fail(self, job: EncodeJob, code: int, reason: str, retry: bool = False) -> None:
        self._forget(job.name)
        self._ctx.fail(job.name, job.request.reply_to, code, reason, retry)

    def _forget(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        self._waiting.pop(name, None)
        self._working.pop(name, None)
        if job is not None:
            job.forgotten = True  # stops its work between two segments of its text
            if job.texts is not None:
                job.texts.cancel()
            for encoding in job.encodings:
                encoding.cancel()
        self._cache.release(name)


def _result(future: Future[T] | None) -> T:
    """Return the result of a future that must be done."""
    assert future is not None
    return future.result()
