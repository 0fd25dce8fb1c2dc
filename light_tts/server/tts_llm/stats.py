"""Metrics of the LLM stage and its periodic throughput log line."""

from __future__ import annotations

import logging
import time

from light_tts.engine.llm.scheduler import Scheduler
from light_tts.server.core import metrics
from light_tts.server.core.settings import Settings


class Stats:
    def __init__(self, stage: metrics.StageMetrics, log: logging.Logger, settings: Settings) -> None:
        self._metrics = stage
        self._log = log
        self._interval = None if settings.disable_log_stats else settings.log_stats_interval
        self._slots = settings.max_total_token_num
        self._since = time.monotonic()
        self._tokens = self._steps = 0
        self._seconds = 0.0  # seconds with steps in progress
        metrics.llm_kv_slots_total.set(self._slots)

    def add(self, tokens: int, steps: int, seconds: float) -> None:
        """Add `steps` steps that took `seconds` in total and produced `tokens`."""
        metrics.llm_tokens_total.inc(tokens)
        for _ in range(steps):
            self._metrics.work_seconds.observe(seconds / steps)
        self._tokens += tokens
        self._steps += steps
        self._seconds += seconds

    def update(self, scheduler: Scheduler) -> None:
        """Update the scheduler's gauges; log a line if `log_stats_interval` has passed and there was work."""
        self._metrics.queue_depth.set(scheduler.queued)
        metrics.llm_waiting_requests.set(scheduler.queued)
        metrics.llm_running_requests.set(len(scheduler.running))
        metrics.llm_paused_requests.set(len(scheduler.paused))
        metrics.llm_kv_slots_used.set(scheduler.used_slots)
        elapsed = time.monotonic() - self._since
        if self._interval is None or elapsed < self._interval:
            return
        if self._steps:
            self._log.info(
                "%.1f tokens/s, %d tokens in %d steps, %d running, %d paused, %d waiting, KV slots %d of %d",
                self._tokens / self._seconds,
                self._tokens,
                self._steps,
                len(scheduler.running),
                len(scheduler.paused),
                scheduler.queued,
                scheduler.used_slots,
                self._slots,
            )
        self._since = time.monotonic()
        self._tokens = self._steps = 0
        self._seconds = 0.0
