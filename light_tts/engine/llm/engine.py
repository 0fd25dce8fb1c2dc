"""Runs the language model: a prefill, or a round of decode steps, is launched, and its tokens are collected
later. What is drawn stays on the device and is fed there, so that more can be launched before anything has
been collected."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from light_tts.common import gpu
from light_tts.common.kv_pool import KVPool, SlotTable
from light_tts.common.row_state import RowState
from light_tts.common.transfer import Download
from light_tts.engine.llm.attention import Span
from light_tts.engine.llm.options import EngineOptions
from light_tts.engine.llm.row_states import set_states
from light_tts.engine.llm.runner import Runner, choose_runner
from light_tts.engine.llm.sequence import Sequence
from light_tts.models.llm.speech_lm import SpeechLM

Work = list[tuple[Sequence, int]]


@dataclass
class Launch:
    """What was launched: for each entry (a sequence, its epoch, how many tokens it draws) a column of
    `tokens`, (steps, entries)."""

    entries: list[tuple[Sequence, int, int]]
    tokens: Download


class LLMEngine:
    """Everything it queues on a GPU is on one stream of its own, in order. So slots and rows may be given
    back and taken again while work that uses them is still queued."""

    def __init__(
        self,
        model: SpeechLM,
        options: EngineOptions,
        runner: Callable[..., Runner] | None = None,
    ) -> None:
        """`runner`: the fastest for the model's device unless given."""
        weight = model.embedding.weight
        self.device = weight.device
        self._stream = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device, priority=gpu.LANGUAGE_MODEL)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which loaded the model
        backbone = model.backbone
        self._window = options.window
        self._launches: deque[Launch] = deque()
        with self._on_stream(), torch.inference_mode():
            self._table = SlotTable(options.slots, options.rows, options.max_len, self.device)
            pool = KVPool(
                backbone.num_hidden_layers,
                options.slots,
                backbone.num_key_value_heads,
                backbone.head_dim,
                weight.dtype,
                self.device,
                options.int8,
            )
            self._states = RowState.empty(options.rows, options.window, model.ids.special.count, self.device)
            runner = runner or choose_runner(self.device)
            self._runner = runner(model, pool, self._table, self._states, options)

    @property
    def in_flight(self) -> int:
        """Launches that have not been collected."""
        return len(self._launches)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Do now what would hold up the first requests."""
        with self._on_stream():
            self._runner.warm_up()

    def launch(self, work: Work) -> None:
        """Begin one of the scheduler's plans. After an exception nothing has begun, but what the device knows
        of the sequences is of no use: when all launches before have been collected, `restart` them."""
        try:
            with self._on_stream(), torch.inference_mode():
                self._launches.append(self._launch(work))
        except BaseException:
            for sequence, _ in work:
                if sequence.row is not None:
                    self._table.truncate(sequence.row, sequence.cached)
            raise

    def restart(self, work: Work) -> Work:
        """After a failed launch -> the same work, as it can be tried again, without the sequences that have
        ended or wait for text."""
        again = []
        for sequence, tokens in work:
            if sequence.ready:
                sequence.recall(len(sequence.inputs) - 1)
                if sequence.row is not None:
                    self._table.truncate(sequence.row, sequence.cached)
                again.append((sequence, min(tokens, sequence.pending)))
        return again

    def collect(self) -> tuple[list[tuple[Sequence, int]], int]:
        """Wait for the oldest launch and let the sequences accept their tokens -> (sequence, how many it took
        in) for those that got any, and the steps that it took. A sequence that has changed its course since
        gets none."""
        launch = self._launches.popleft()
        tokens = launch.tokens.wait()
        columns = tokens.T.tolist()
        taken = []
        for (sequence, epoch, draws), column in zip(launch.entries, columns, strict=True):
            if sequence.epoch == epoch:
                taken.append((sequence, sequence.accept_all(column[:draws])))
                if not sequence.on_device:
                    self._table.truncate(sequence.row, sequence.cached)
        return taken, len(tokens)

    def release(self, sequence: Sequence) -> None:
        """Give back all slots of the sequence; it may go on later by a new prefill."""
        if sequence.row is not None:
            self._table.close(sequence.row)
            sequence.row = None
        sequence.recall(0)

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        if self._stream is not None:
            self._stream.synchronize()

    def check_device(self) -> None:
        """Raises when the device no longer works, so that only a new process can go on."""
        torch.zeros(1, device=self.device).item()
        self.synchronize()

    def _on_stream(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _launch(self, work: Work) -> Launch:
        spans = [self._extend(sequence, tokens) for sequence, tokens in work]
        self._table.upload()
        if work[0][0].on_device:
            drawing = work
            tokens = self._runner.decode(spans)
        else:
            complete = [i for i, (sequence, tokens) in enumerate(work) if tokens == sequence.pending]
            drawing = [(work[i][0], 1) for i in complete]
            set_states(self._states, [(work[i][0], spans[i].end) for i in complete], self._window)
            ids = [i for s, tokens in work for i in s.inputs[s.cached : s.cached + tokens]]
            tokens = self._runner.prefill(ids, spans, complete)
        download = Download(tokens)
        for sequence, count in work:
            sequence.cached += count
        for sequence, draws in drawing:
            sequence.on_device = True
            sequence.ahead += draws
        return Launch([(sequence, sequence.epoch, draws) for sequence, draws in drawing], download)

    def _extend(self, sequence: Sequence, tokens: int) -> Span:
        if sequence.row is None:
            sequence.row = self._table.open()
        self._table.extend(sequence.row, tokens)
        return Span(sequence.row, sequence.cached, tokens)
