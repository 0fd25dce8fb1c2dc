"""Every metric of the server; what each means is described in docs/metrics.md.

Prometheus's multiprocess mode: each process writes its values to files in PROMETHEUS_MULTIPROC_DIR, which is
set in its environment before this module is imported, and any HTTP worker adds them up for GET /metrics.
Gauges are sums over the processes alive; the supervisor marks the dead ones.
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
requests_total = Counter("light_tts_requests", "Requests that have ended", ["route", "outcome"])
request_duration_seconds = Histogram(
    "light_tts_request_duration_seconds",
    "From the arrival of a request to its last sample, of requests that ended well",
    ["route"],
    buckets=_REQUEST_SECONDS,
)
time_to_first_audio_seconds = Histogram(
    "light_tts_time_to_first_audio_seconds",
    "From the arrival of a request to the first sample sent",
    ["route"],
    buckets=_REQUEST_SECONDS,
)
real_time_factor = Histogram(
    "light_tts_real_time_factor",
    "Duration of a request divided by that of its audio, where it ended well and its text came whole",
    ["route"],
    buckets=_FACTORS,
)
stream_underruns = Histogram(
    "light_tts_stream_underruns",
    "How often a player that starts with the first piece runs dry, of streams whose text came whole",
    ["route"],
    buckets=_UNDERRUNS,
)
stream_buffer_seconds = Histogram(
    "light_tts_stream_buffer_seconds",
    "What a player had to wait after the first piece so as never to run dry, of the same streams",
    ["route"],
    buckets=_STAGE_SECONDS,
)
audio_seconds_total = Counter("light_tts_audio_seconds", "Seconds of audio sent to clients")
refused_total = Counter(
    "light_tts_refused",
    "Requests that were not accepted though nothing is wrong with what they ask for",
    ["reason"],
)
request_recoveries_total = Counter(
    "light_tts_request_recoveries", "Requests submitted again because a stage died or lost something"
)
http_connections = Gauge(
    "light_tts_http_connections", "Connections to the HTTP workers", multiprocess_mode="livesum"
)
refused_connections_total = Counter(
    "light_tts_refused_connections",
    "Connections ended because of what came, did not come or was too much; status: that of the answer",
    ["status"],
)

# -- every stage
stage_queue_depth = Gauge(
    "light_tts_stage_queue_depth",
    "Work items that wait in a stage",
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
stage_restarts_total = Counter("light_tts_stage_restarts", "Stages started again after they died", ["stage"])

# -- encode
prompt_cache_hits_total = Counter("light_tts_prompt_cache_hits", "Prompts whose features were kept")
prompt_cache_misses_total = Counter("light_tts_prompt_cache_misses", "Prompts whose features were computed")

# -- LLM
llm_running_requests = Gauge(
    "light_tts_llm_running_requests", "Requests that generate tokens", multiprocess_mode="livesum"
)
llm_paused_requests = Gauge(
    "light_tts_llm_paused_requests", "Requests paused for want of KV slots", multiprocess_mode="livesum"
)
llm_waiting_requests = Gauge(
    "light_tts_llm_waiting_requests", "Requests not yet admitted", multiprocess_mode="livesum"
)
llm_kv_slots_used = Gauge("light_tts_llm_kv_slots_used", "KV cache in use", multiprocess_mode="livesum")
llm_kv_slots_total = Gauge("light_tts_llm_kv_slots_total", "KV cache size", multiprocess_mode="livesum")
llm_tokens_total = Counter("light_tts_llm_tokens", "Speech tokens generated")

# -- decode
decode_batch_size = Histogram(
    "light_tts_decode_batch_size", "Requests spoken together in one batch", buckets=_BATCH_SIZES
)


def render() -> tuple[bytes, str]:
    """Prometheus text of the whole server, and its content type."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
