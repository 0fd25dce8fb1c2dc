"""All settings of a server. They are read once (flags, then --config, see api_cli), validated, frozen and
passed to every process as one JSON file."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class SettingsError(ValueError):
    """Invalid or contradictory flags; the message names them."""


Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    # -- HTTP
    host: Annotated[str, Meta(description="address to listen on")] = "localhost"
    port: Annotated[int, Meta(ge=1, le=65535, description="HTTP port")] = 8080
    replace: Annotated[
        bool,
        Meta(
            description="take over the port of the server that is running on it as soon as this one is "
            "ready; the old server finishes its requests and exits"
        ),
    ] = False
    httpserver_workers: Annotated[Count, Meta(description="HTTP worker processes")] = 1
    max_text_length: Annotated[Count, Meta(description="maximum number of characters in tts_text")] = 5000
    min_prompt_seconds: Annotated[
        Seconds, Meta(description="minimum length of a prompt recording in seconds")
    ] = 0.5
    max_prompt_seconds: Annotated[
        Seconds, Meta(le=30, description="maximum length of a prompt recording in seconds")
    ] = 30.0
    max_upload_mb: Annotated[
        Seconds,
        Meta(
            description="maximum size of a request body or WebSocket message in MiB; larger: 413, close "
            "code 1009"
        ),
    ] = 20.0
    max_inflight_upload_mb: Annotated[
        Seconds,
        Meta(
            description="maximum MiB of bodies and messages that one HTTP worker holds in memory "
            "unprocessed; beyond: 429, close code 1013"
        ),
    ] = 64.0
    max_connections: Annotated[
        Count,
        Meta(
            description="maximum number of connections per HTTP worker; a new one replaces the one that has"
            " been idle longest, or gets 503 if none is idle. Limited to three quarters of the "
            "process's open-file limit"
        ),
    ] = 2000
    header_timeout: Annotated[
        Seconds, Meta(description="seconds to receive the complete header of a request; then 408")
    ] = 10.0
    body_timeout: Annotated[
        Seconds, Meta(description="seconds without receiving any data of an incomplete body; then 408")
    ] = 20.0
    idle_timeout: Annotated[
        Count, Meta(description="seconds an idle connection is kept open after a response")
    ] = 5
    request_timeout: Annotated[
        Seconds, Meta(description="maximum duration of a request in seconds; then 504")
    ] = 300.0
    max_pending_requests: Annotated[
        Count, Meta(description="maximum number of unfinished requests over all HTTP workers; beyond: 429")
    ] = 512
    max_wait: Annotated[
        Seconds,
        Meta(
            description="maximum expected queueing time of a request in seconds, estimated from measured "
            "service times; beyond, or if --request_timeout could not be met: 429. Up to 16 "
            "requests are accepted regardless"
        ),
    ] = 2.5
    drain_timeout: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(description="seconds that accepted requests get to finish after SIGTERM"),
    ] = 60.0
    health_cache_seconds: Annotated[
        Annotated[float, Meta(ge=0)], Meta(description="seconds a /health result is reused")
    ] = 5.0
    voice_aliases: Annotated[
        str,
        Meta(
            description='JSON file that maps names to voices, {"alloy": ["anna"]} (default: the names of '
            "OpenAI's voices)"
        ),
    ] = ""
    spk_dir: Annotated[str, Meta(description="directory of the named voices created with /add_spk")] = (
        "voices"
    )
    align_prompt: Annotated[
        bool,
        Meta(
            description="named voices created from now on fill whole chunks of the flow, by cutting or "
            "adding silence, so that streams start up to 0.96 s of speech earlier"
        ),
    ] = True

    # -- access
    api_key: Annotated[
        str,
        Meta(
            description="comma-separated API keys; if set, requests need one. Prefer --api_key_file or the "
            "environment variable LIGHT_TTS_API_KEYS, which other users of the machine cannot "
            "see"
        ),
    ] = ""
    api_key_file: Annotated[str, Meta(description="file of API keys, one per line; # starts a comment")] = ""
    key_requests_per_minute: Annotated[
        Count | None, Meta(description="maximum number of requests per minute and API key; beyond: 429")
    ] = None
    key_streams: Annotated[
        Count | None, Meta(description="maximum number of concurrent requests per API key; beyond: 429")
    ] = None
    cors_origins: Annotated[
        str,
        Meta(description="comma-separated origins whose pages may use the server; *: all"),
    ] = ""
    ref_audio_hosts: Annotated[
        str,
        Meta(
            description="comma-separated hosts from which ref_audio may be given as a URL (NAME, NAME:PORT); "
            "empty: none"
        ),
    ] = ""
    ssl_certfile: Annotated[
        str, Meta(description="PEM file of the TLS certificate; enables HTTPS and WSS")
    ] = ""
    ssl_keyfile: Annotated[str, Meta(description="PEM file of its private key")] = ""

    # -- checkpoint and devices
    model_dir: Annotated[
        str,
        Meta(
            description="checkpoint directory (CosyVoice2 or CosyVoice3; default: the small voice that comes "
            "with Light-TTS)"
        ),
    ] = ""
    device: Annotated[Literal["auto", "cuda", "cpu"], Meta(description="auto: CUDA if there is a GPU")] = (
        "auto"
    )
    data_type: Annotated[
        Literal["float16", "bfloat16", "float32"],
        Meta(
            description="data type of the LLM and the flow on a GPU (short: fp16, bf16, fp32); always "
            "float32 on the CPU"
        ),
    ] = "float16"
    n_timesteps: Annotated[
        Count | None,
        Meta(
            description="Euler steps of the flow; fewer are faster (default: the checkpoint's value, else 10)"
        ),
    ] = None
    load_trt: Annotated[bool, Meta(description="run the flow estimator as a TensorRT engine")] = True

    # -- processes
    zmq_mode: Annotated[
        str, Meta(description="ipc://DIRECTORY/ (Unix sockets in that directory) or tcp:// (loopback ports)")
    ] = "ipc:///tmp/"
    encode_process_num: Annotated[Count, Meta(description="encode processes")] = 1
    encode_paral_num: Annotated[
        Count, Meta(description="maximum number of concurrent requests per encode process")
    ] = 50
    decode_process_num: Annotated[Count, Meta(description="decode processes (GPU = index % GPUs)")] = 1
    decode_paral_num: Annotated[Count, Meta(description="batches in flight per decode process")] = 1
    decode_max_batch_size: Annotated[
        Count, Meta(description="maximum number of requests in a decode batch")
    ] = 1
    mps: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="CUDA MPS, which lets processes use a GPU at the same time: auto (if available), on"
            " (fail to start without it), off"
        ),
    ] = "auto"
    cache_capacity: Annotated[
        Count, Meta(description="number of prompts whose features are cached per encode process")
    ] = 200

    # -- LLM scheduling
    gpt_paral_num: Annotated[
        Count, Meta(description="maximum number of requests decoded at once per LLM process")
    ] = 50
    gpt_paral_step_num: Annotated[
        Count, Meta(description="steps before an LLM process yields the GPU to that of another style")
    ] = 200
    running_max_req_size: Annotated[
        Count | None,
        Meta(
            description="maximum number of running and paused requests per LLM process (default: "
            "gpt_paral_num)"
        ),
    ] = None
    max_total_token_num: Annotated[Count, Meta(description="KV cache size in tokens")] = 65536
    max_part_tokens: Annotated[
        Count,
        Meta(
            description="maximum number of speech tokens per part of a text (25 per second); models are "
            "trained on up to 30 s"
        ),
    ] = 1500
    max_req_total_len: Annotated[
        Count, Meta(description="maximum number of prompt and output tokens per request")
    ] = 8192
    batch_max_tokens: Annotated[
        Count, Meta(description="maximum number of tokens in a prefill batch; longer prefills are split")
    ] = 2048
    router_max_wait_tokens: Annotated[Count, Meta(description="decode steps between admissions")] = 8
    router_token_ratio: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        Meta(
            description="KV cache utilization above which admission assumes the maximum output length of "
            "each request (0: always)"
        ),
    ] = 0.0
    router_max_new_token_len: Annotated[
        Count, Meta(description="output length assumed for a request below router_token_ratio")
    ] = 1024
    mode: Annotated[
        tuple[Literal["triton_flashdecoding", "triton_int8kv"], ...],
        Meta(
            description="triton_flashdecoding: split-K decode attention; triton_int8kv (or ppl_int8kv): "
            "int8 KV cache"
        ),
    ] = ("triton_flashdecoding",)
    disable_cudagraph: Annotated[bool, Meta(description="run LLM steps without CUDA graphs")] = False
    graph_max_batch_size: Annotated[Count, Meta(description="maximum batch size of a CUDA graph")] = 128
    graph_max_len_in_batch: Annotated[Count, Meta(description="maximum request length in a CUDA graph")] = (
        8192
    )

    # -- streaming
    stream_hop: Annotated[
        Literal["fixed", "grow", "grow_masked"],
        Meta(
            description="chunk lengths of a streamed response: fixed (25 tokens) or grow (25, 50, 100 "
            "tokens; the last chunk with full attention). With grow the first chunk is just as "
            "early; the total cost is lower on a GPU and higher on a CPU. grow_masked: the last chunk "
            "sees no more than the others, as with fixed; with --flow_memory_gpu_mb the cheapest"
        ),
    ] = "fixed"

    @property
    def chunks_grow(self) -> bool:
        return self.stream_hop != "fixed"

    @property
    def full_last_chunk(self) -> bool:
        """Whether the last chunk of a stream is computed with full attention."""
        return self.stream_hop == "grow"

    first_hop: Annotated[
        Annotated[int, Meta(ge=5)] | None,
        Meta(
            description="speech tokens (0.04 s each) of a shorter first chunk, at most 20 if chunks have 25: "
            "audio starts earlier, but the flow sees less of what follows (default: a whole chunk)"
        ),
    ] = None
    flow_memory_mb: Annotated[
        Annotated[int, Meta(ge=0)] | Literal["auto"],
        Meta(
            description="on a CPU: at most so many MiB per decode process for the flow's cached state of "
            "streams and voices, so that a chunk computes only its own frames (per second of speech and "
            "prompt: 8 MiB with the voice that comes with Light-TTS, 230 with CosyVoice2-0.5B); auto: all "
            "decode processes together a quarter of the memory, but at least 1024 MiB each"
        ),
    ] = "auto"
    flow_memory_gpu_mb: Annotated[
        Annotated[int, Meta(ge=0)] | Literal["auto"],
        Meta(
            description="the same on a GPU, allocated at startup (about 110 MiB per second of speech with "
            "CosyVoice2-0.5B in 16 bits); auto: at most 40000 MiB and a fifth of the GPU's memory, divided "
            "among its decode processes; 0: every chunk is computed from the beginning; not with TensorRT"
        ),
    ] = "auto"

    redraw_misread: Annotated[
        bool,
        Meta(
            description="generate a part once more if the LLM's attention shows that words were skipped or "
            "repeated, before any of it is sent; for checkpoints with alignment_heads"
        ),
    ] = True

    # -- operation
    log_dir: Annotated[
        str, Meta(description="directory of light-tts.log; empty: log to the console only")
    ] = "logs"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="minimum level that is logged")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="format of log lines; json: one object per line")
    ] = "text"
    otlp_endpoint: Annotated[
        str,
        Meta(
            description="send OpenTelemetry traces of requests to this OTLP/HTTP collector, for example "
            "http://localhost:4318 (extra otel); empty: none"
        ),
    ] = ""
    log_stats_interval: Annotated[
        Seconds, Meta(description="seconds between throughput lines in the log")
    ] = 10.0
    disable_log_stats: Annotated[bool, Meta(description="do not log throughput")] = False
    hang_timeout_gpu: Annotated[
        Seconds,
        Meta(description="seconds without progress after which a stage on a GPU is killed and restarted"),
    ] = 10.0
    hang_timeout_cpu: Annotated[
        Seconds,
        Meta(description="seconds without progress after which a stage on the CPU is killed and restarted"),
    ] = 30.0
    health_monitor: Annotated[
        bool,
        Meta(
            description="check /health regularly; after 3 consecutive failures restart the stages that "
            "cause them"
        ),
    ] = False
    health_check_interval: Annotated[
        Seconds, Meta(description="seconds between the health monitor's checks")
    ] = 88.0

    @property
    def alive_requests(self) -> int:
        """Maximum number of running and paused requests in one LLM process."""
        return self.running_max_req_size or self.gpt_paral_num

    @property
    def int8_kv(self) -> bool:
        return "triton_int8kv" in self.mode

    def check(self) -> None:
        """Raise SettingsError if two settings contradict each other."""
        if self.max_req_total_len > self.max_total_token_num:
            raise SettingsError(
                f"--max_req_total_len {self.max_req_total_len} is above --max_total_token_num "
                f"{self.max_total_token_num}: one request could never fit the KV cache"
            )
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise SettingsError("--ssl_certfile and --ssl_keyfile go together: give both or neither")
        if self.min_prompt_seconds >= self.max_prompt_seconds:
            raise SettingsError(
                f"--min_prompt_seconds {self.min_prompt_seconds} must be below --max_prompt_seconds "
                f"{self.max_prompt_seconds}"
            )
        if self.max_upload_mb > self.max_inflight_upload_mb:
            raise SettingsError(
                f"--max_upload_mb {self.max_upload_mb:g} is above --max_inflight_upload_mb "
                f"{self.max_inflight_upload_mb:g}: the largest body would never be accepted"
            )
        if not self.zmq_mode.startswith(("ipc://", "tcp://")):
            raise SettingsError(f"--zmq_mode {self.zmq_mode!r} must start with ipc:// or tcp://")


def load(path: str) -> Settings:
    """Return the settings from the JSON file that `save` wrote."""
    with open(path, "rb") as file:
        return msgspec.json.decode(file.read(), type=Settings)


def save(settings: Settings, path: str) -> None:
    with open(path, "wb") as file:
        file.write(msgspec.json.encode(settings))
