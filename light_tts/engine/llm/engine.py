"""Runs the language model. A prefill or a round of decode steps is launched, and its tokens are collected
later. Sampled tokens stay on the device and are fed back there, so that more work can be launched before any
has been collected."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from light_tts.common import gpu
from light_tts.common.transfer import Download
from light_tts.engine.llm.attention import RowSpan
from light_tts.engine.llm.memory import EngineMemory
from light_tts.engine.llm.options import EngineOptions
from light_tts.engine.llm.row_states import state_records
from light_tts.engine.llm.runner import Runner, choose_runner
from light_tts.engine.llm.sequence import Sequence
from light_tts.models.llm.speech_lm import SpeechLM

Work = list[tuple[Sequence, int]]


@dataclass
class Launch:
    """A launch in progress: for each entry (sequence, its epoch, number of tokens it samples) there is a
    column of `tokens`, (steps, entries)."""

    entries: list[tuple[Sequence, int, int]]
    tokens: Download


class LLMEngine:
    """Launches work and collects results. All GPU work is queued on one stream in order, so slots and rows
    may be freed and reused while work that uses them is still queued."""

    def __init__(
        self,
        model: SpeechLM,
        options: EngineOptions,
        runner: Callable[..., Runner] | None = None,
    ) -> None:
        """`runner`: default is the fastest for the model's device."""
        self.device = model.embedding.weight.device
        self._stream = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device, priority=gpu.LANGUAGE_MODEL)
            # the stream that loaded the model
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._window = options.window
        self._launches: deque[Launch] = deque()
        with self._on_stream(), torch.inference_mode():
            memory = EngineMemory.empty(model, options)
            self._table, self._states = memory.table, memory.states
            runner = runner or choose_runner(self.device)
            self._runner = runner(model, memory, options)

    @property
    def in_flight(self) -> int:
        """Number of launches that have not been collected."""
        return len(self._launches)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Do in advance what would delay the first requests."""
        with self._on_stream():
            self._runner.warm_up()

    @property
    def recorded(self) -> int:
        """Number of CUDA graphs."""
        return 0 if self._runner.graphs is None else len(self._runner.graphs)

    @property
    def unrecorded(self) -> int:
        """Number of CUDA graphs that `record_next` can still record."""
        return 0 if self._runner.graphs is None else self._runner.graphs.unrecorded

    def record_next(self) -> None:
        """Record one more CUDA graph, and wait until the device has done so. Nothing may be in flight."""
        assert not self._launches and self._runner.graphs is not None
        with self._on_stream():
            self._runner.graphs.record_next()

    def launch(self, work: Work, urgent: bool = False) -> None:
        """Launch one of the scheduler's plans. After an exception nothing has been launched, but the device's
        state of the sequences is invalid: once all earlier launches have been collected, `restart` them.
        urgent: see `Download`."""
        try:
            with self._on_stream(), torch.inference_mode():
                self._launches.append(self._launch(work, urgent))
        except BaseException:
            for sequence, _ in work:
                self._truncate(sequence)
            raise

    def restart(self, work: Work) -> Work:
        """After a failed launch, return the same work in a form that can be retried, without sequences that
        have ended or wait for text."""
        again = []
        for sequence, tokens in work:
            if sequence.ready:
                sequence.recall(len(sequence.inputs) - 1)
                self._truncate(sequence)
                again.append((sequence, min(tokens, sequence.pending)))
        return again

    def collect(self) -> tuple[list[tuple[Sequence, int]], int]:
        """Wait for the oldest launch and pass the tokens to its sequences. Returns (sequence, number of
        tokens accepted) for the sequences that got any, and the number of steps. A sequence whose epoch has
        changed gets none."""
        launch = self._launches.popleft()
        tokens = launch.tokens.wait()
        columns = tokens.T.tolist()
        taken = []
        for (sequence, epoch, draws), column in zip(launch.entries, columns, strict=True):
            if sequence.epoch == epoch:
                taken.append((sequence, sequence.accept_all(column[:draws])))
                if not sequence.on_device:
                    self._truncate(sequence)
        return taken, len(tokens)

    def _truncate(self, sequence: Sequence) -> None:
        """Give back the slots of what is not cached, if it has any."""
        if sequence.row is not None:
            self._table.truncate(sequence.row, sequence.cached)

    def release(self, sequence: Sequence) -> None:
        """Free all slots of the sequence; it can resume later with a new prefill."""
        if sequence.row is not None:
            self._table.close(sequence.row)
            sequence.row = None
        sequence.recall(0)

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self._stream is not None:
            self._stream.synchronize()

    def check_device(self) -> None:
        """Raise if the device no longer works and only a new process can continue."""
        torch.zeros(1, device=self.device).item()
        self.synchronize()

    def _on_stream(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _launch(self, work: Work, urgent: bool) -> Launch:
        spans = [self._extend(sequence, tokens) for sequence, tokens in work]
        if work[0][0].on_device:
            drawing = work
            tokens = self._runner.decode(spans)
        else:
            complete = [i for i, (sequence, tokens) in enumerate(work) if tokens == sequence.pending]
            drawing = [(work[i][0], 1) for i in complete]
            begun = [(work[i][0], spans[i].end) for i in complete]
            records = state_records(self._states.record, begun, self._window)
            ids: list[int] = []
            for sequence, count in work:
                ids += sequence.inputs[sequence.cached : sequence.cached + count]
            tokens = self._runner.prefill(ids, spans, complete, records)
        download = Download(tokens, urgent)
        for sequence, count in work:
            sequence.cached += count
        for sequence, draws in drawing:
            sequence.on_device = True
            sequence.ahead += draws
        return Launch([(sequence, sequence.epoch, draws) for sequence, draws in drawing], download)

    def _extend(self, sequence: Sequence, tokens: int) -> RowSpan:
        if sequence.row is None:
            sequence.row = self._table.open()
        self._table.extend(sequence.row, tokens)
        return RowSpan(sequence.row, sequence.cached, tokens)
