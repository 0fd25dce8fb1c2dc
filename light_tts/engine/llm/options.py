"""Size limits of an LLM engine."""

from __future__ import annotations

from dataclasses import dataclass

from light_tts.common.sampling_rule import MAX_TOP_K, MAX_WIN_SIZE

# Larger prefills have no CUDA graph. Launched kernel by kernel beside the flow, they took 7 to 35 ms.
PREFILL_TOKENS = 2048
PREFILL_REQUESTS = 16


@dataclass(frozen=True)
class EngineOptions:
    """`slots`: size of the KV pool in tokens; `rows`: maximum number of requests in it; `max_len`: maximum
    number of tokens per request; `window`, `max_top_k`: largest `win_size` and `top_k` of any request's
    SamplingRule; `round_steps`: maximum number of decode steps per launch; `graph_max_batch`,
    `graph_max_len`: largest batch and longest request that run as CUDA graphs, 0: none."""

    slots: int
    rows: int
    max_len: int
    window: int = MAX_WIN_SIZE
    max_top_k: int = MAX_TOP_K
    int8: bool = False
    round_steps: int = 1
    graph_max_batch: int = 0
    graph_max_len: int = 0
