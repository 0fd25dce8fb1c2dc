"""All metrics of the server. docs/metrics.md describes each of them.

Uses Prometheus's multiprocess mode: each process writes its values to files in PROMETHEUS_MULTIPROC_DIR,
which must be set in its environment before this module is imported, and any HTTP worker aggregates them for
GET /metrics. Gauges are summed over live processes; the supervisor marks the dead ones.
"""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

_REQUEST_SECONDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300)
_STAGE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_UNDERRUNS = (0, 1, 2, 3, 5, 10, 20)
_FACTORS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

# -- HTTP workers
requests_total = Counter("light_tts_requests", "Requests finished", ["route", "outcome"])
request_duration_seconds = Histogram(
    "light_tts_request_duration_seconds",
    "Time from the arrival of a request to its last sample; successful requests only",
    ["route"],
    buckets=_REQUEST_SECONDS,
)
time_to_first_audio_seconds = Histogram(
    "light_tts_time_to_first_audio_seconds",
    "Time from the arrival of a request to the first sample sent",
    ["route"],
    buckets=_REQUEST_SECONDS,
)
real_time_factor = Histogram(
    "light_tts_real_time_factor",
    "Duration of a request divided by that of its audio; successful requests, bistream excluded",
    ["route"],
    buckets=_FACTORS,
)
stream_underruns = Histogram(
    "light_tts_stream_underruns",
    "Underruns of a player that starts with the first chunk; streams, bistream excluded",
    ["route"],
    buckets=_UNDERRUNS,
)
stream_buffer_seconds = Histogram(
    "light_tts_stream_buffer_seconds",
    "Buffering after the first chunk that would have avoided all underruns; same streams",
    ["route"],
    buckets=_STAGE_SECONDS,
)
audio_seconds_in_work = Gauge(
    "light_tts_audio_seconds_in_work",
    "Seconds of audio that accepted requests wait for, estimated from their texts",
    multiprocess_mode="livesum",
)
audio_seconds_total = Counter("light_tts_audio_seconds", "Seconds of audio sent to clients")
refused_total = Counter(
    "light_tts_refused",
    "Valid requests that were not accepted",
    ["reason"],
)
request_recoveries_total = Counter(
    "light_tts_request_recoveries", "Requests resubmitted because a stage died or lost data"
)
http_connections = Gauge(
    "light_tts_http_connections", "Open connections to the HTTP workers", multiprocess_mode="livesum"
)
refused_connections_total = Counter(
    "light_tts_refused_connections",
    "Connections closed for bad, late or excessive input; status: HTTP status of the response",
    ["status"],
)

# -- every stage
stage_queue_depth = Gauge(
    "light_tts_stage_queue_depth",
    "Work items waiting in a stage",
    ["stage"],
    multiprocess_mode="livesum",
)
stage_queue_seconds = Histogram(
    "light_tts_stage_queue_seconds",
    "Time a work item waited in a stage",
    ["stage"],
    buckets=_STAGE_SECONDS,
)
stage_work_seconds = Histogram(
    "light_tts_stage_work_seconds",
    "Time a stage worked on an item (encode: request, llm: step, decode: batch)",
    ["stage"],
    buckets=_STAGE_SECONDS,
)
stage_restarts_total = Counter("light_tts_stage_restarts", "Stages restarted after they died", ["stage"])

# -- encode
prompt_cache_hits_total = Counter("light_tts_prompt_cache_hits", "Prompts whose features were cached")
prompt_cache_misses_total = Counter("light_tts_prompt_cache_misses", "Prompts whose features were computed")

redrawn_total = Counter(
    "light_tts_redrawn",
    "Speech drawn again with the next seed, and why: parts whose words were skipped or repeated, requests "
    "without any speech",
    ["reason"],
)

# -- LLM
llm_running_requests = Gauge(
    "light_tts_llm_running_requests", "Requests generating tokens", multiprocess_mode="livesum"
)
llm_paused_requests = Gauge(
    "light_tts_llm_paused_requests", "Requests paused for lack of KV cache slots", multiprocess_mode="livesum"
)
llm_waiting_requests = Gauge(
    "light_tts_llm_waiting_requests", "Requests not yet admitted", multiprocess_mode="livesum"
)
llm_kv_slots_used = Gauge("light_tts_llm_kv_slots_used", "KV cache in use", multiprocess_mode="livesum")
llm_kv_slots_total = Gauge("light_tts_llm_kv_slots_total", "KV cache size", multiprocess_mode="livesum")
llm_tokens_total = Counter("light_tts_llm_tokens", "Speech tokens generated")

# -- decode
decode_batch_size = Histogram(
    "light_tts_decode_batch_size", "Requests in one decode batch", buckets=_BATCH_SIZES
)


class StageMetrics:
    """Those of every stage, with the label of one."""

    def __init__(self, stage: str) -> None:
        self.queue_depth = stage_queue_depth.labels(stage)
        self.queue_seconds = stage_queue_seconds.labels(stage)
        self.work_seconds = stage_work_seconds.labels(stage)


def render() -> tuple[bytes, str]:
    """Return the metrics of the whole server in Prometheus text format, and the content type."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
