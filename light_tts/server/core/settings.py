"""All settings of a server, each with its meaning. Read once (flags, then --config, see api_cli), validated,
frozen, handed to every process as one JSON file."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class SettingsError(ValueError):
    """A flag is wrong or two flags contradict each other; the message names them."""


Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    # -- HTTP
    host: Annotated[str, Meta(description="address to listen on")] = "localhost"
    port: Annotated[int, Meta(ge=1, le=65535, description="HTTP port")] = 8080
    replace: Annotated[
        bool,
        Meta(
            description="take the port over from the server that runs on it, once this one serves; that one "
            "finishes its requests and ends"
        ),
    ] = False
    httpserver_workers: Annotated[Count, Meta(description="HTTP worker processes")] = 1
    max_text_length: Annotated[Count, Meta(description="characters of tts_text in one request")] = 5000
    min_prompt_seconds: Annotated[Seconds, Meta(description="shortest prompt recording")] = 0.5
    max_prompt_seconds: Annotated[Seconds, Meta(le=30, description="longest prompt recording")] = 30.0
    max_upload_mb: Annotated[
        Seconds, Meta(description="largest request body or WebSocket message in MiB; beyond: 413, close 1009")
    ] = 20.0
    max_inflight_upload_mb: Annotated[
        Seconds,
        Meta(
            description="MiB of all bodies and messages that an HTTP worker has received and not yet read; "
            "beyond: 429, close 1013"
        ),
    ] = 64.0
    max_connections: Annotated[
        Count,
        Meta(
            description="connections of an HTTP worker; a new one takes the place of the one idle longest; "
            "none idle: 503. At most three quarters of the files that a process may open"
        ),
    ] = 2000
    header_timeout: Annotated[
        Seconds, Meta(description="seconds until the whole header of a request has come; then 408")
    ] = 10.0
    body_timeout: Annotated[
        Seconds, Meta(description="seconds without a byte of a body that is not complete; then 408")
    ] = 20.0
    idle_timeout: Annotated[
        Count, Meta(description="seconds a connection stays open after an answer without a next request")
    ] = 5
    request_timeout: Annotated[Seconds, Meta(description="seconds a request may take; then 504")] = 300.0
    max_pending_requests: Annotated[
        Count, Meta(description="requests accepted and not finished, over all HTTP workers; beyond: 429")
    ] = 512
    max_wait: Annotated[
        Seconds,
        Meta(
            description="seconds that a request may be expected to wait for those in work, as far as "
            "measured; beyond, and where --request_timeout could not be kept: 429. Up to 16 requests are "
            "accepted however long they wait"
        ),
    ] = 2.5
    drain_timeout: Annotated[
        Annotated[float, Meta(ge=0)], Meta(description="seconds that accepted requests have after SIGTERM")
    ] = 60.0
    health_cache_seconds: Annotated[
        Annotated[float, Meta(ge=0)], Meta(description="how long a result of /health is reused")
    ] = 5.0
    voice_aliases: Annotated[
        str,
        Meta(
            description='JSON file of names that stand for voices, {"alloy": ["anna"]} (default: those of '
            "OpenAI's voices)"
        ),
    ] = ""
    spk_dir: Annotated[str, Meta(description="directory of the named voices made with /add_spk")] = "voices"

    # -- who may use it
    api_key: Annotated[
        str,
        Meta(
            description="API keys, separated by commas; with any, requests need one. Better in "
            "--api_key_file or the variable LIGHT_TTS_API_KEYS, which others on the machine cannot see"
        ),
    ] = ""
    api_key_file: Annotated[str, Meta(description="file of API keys, one a line; # begins a comment")] = ""
    key_requests_per_minute: Annotated[
        Count | None, Meta(description="requests a minute with one API key; beyond: 429")
    ] = None
    key_streams: Annotated[
        Count | None, Meta(description="requests under way at once with one API key; beyond: 429")
    ] = None
    cors_origins: Annotated[
        str,
        Meta(description="origins whose pages may use the server, separated by commas; *: all pages"),
    ] = ""
    ref_audio_hosts: Annotated[
        str,
        Meta(
            description="hosts from which ref_audio may name a recording by its address, separated by "
            "commas (NAME, NAME:PORT); empty: none"
        ),
    ] = ""
    ssl_certfile: Annotated[str, Meta(description="PEM file of the certificate: serve HTTPS and WSS")] = ""
    ssl_keyfile: Annotated[str, Meta(description="PEM file of its private key")] = ""

    # -- checkpoint and devices
    model_dir: Annotated[
        str,
        Meta(
            description="checkpoint directory (CosyVoice2 format; default: the small voice that comes with "
            "Light-TTS)"
        ),
    ] = ""
    device: Annotated[Literal["auto", "cuda", "cpu"], Meta(description="auto: CUDA where there is a GPU")] = (
        "auto"
    )
    data_type: Annotated[
        Literal["float16", "bfloat16", "float32"],
        Meta(description="type of the LLM and the flow on a GPU (fp16, bf16, fp32 for short); CPU: float32"),
    ] = "float16"
    n_timesteps: Annotated[
        Count | None,
        Meta(
            description="Euler steps of the flow: fewer cost less (default: as the checkpoint says, else 10)"
        ),
    ] = None
    load_trt: Annotated[bool, Meta(description="run the flow estimator as a TensorRT engine")] = True

    # -- processes
    zmq_mode: Annotated[
        str, Meta(description="ipc://DIRECTORY/ (sockets lie there) or tcp:// (loopback ports)")
    ] = "ipc:///tmp/"
    encode_process_num: Annotated[Count, Meta(description="encode processes")] = 1
    encode_paral_num: Annotated[Count, Meta(description="requests in work at once in an encode process")] = 50
    decode_process_num: Annotated[Count, Meta(description="decode processes (GPU = index % GPUs)")] = 1
    decode_paral_num: Annotated[Count, Meta(description="batches in flight in a decode process")] = 1
    decode_max_batch_size: Annotated[Count, Meta(description="requests in one decode batch")] = 1
    mps: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="CUDA MPS lets processes use a GPU at the same time: auto (where it works), on (or "
            "the start fails), off"
        ),
    ] = "auto"
    cache_capacity: Annotated[
        Count, Meta(description="prompts whose features are kept, per encode process")
    ] = 200

    # -- LLM scheduling
    gpt_paral_num: Annotated[Count, Meta(description="requests an LLM process decodes at once")] = 50
    gpt_paral_step_num: Annotated[
        Count, Meta(description="steps before an LLM process lets another style's have the GPU")
    ] = 200
    running_max_req_size: Annotated[
        Count | None,
        Meta(description="requests running and paused in an LLM process (default: gpt_paral_num)"),
    ] = None
    max_total_token_num: Annotated[Count, Meta(description="KV cache size in tokens")] = 65536
    max_part_tokens: Annotated[
        Count,
        Meta(
            description="most speech tokens of one part of a text (25 a second); models are trained with up "
            "to 30 s"
        ),
    ] = 1500
    max_req_total_len: Annotated[Count, Meta(description="prompt + output tokens of one request")] = 8192
    batch_max_tokens: Annotated[
        Count | None,
        Meta(
            description="tokens of one prefill batch; longer prefills are done in pieces (default: a sixth "
            "of max_total_token_num, at least max_req_total_len)"
        ),
    ] = None
    router_max_wait_tokens: Annotated[Count, Meta(description="decode steps between admissions")] = 8
    router_token_ratio: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        Meta(
            description="share of the KV cache in use from which a request is counted with its longest "
            "possible output (0: always)"
        ),
    ] = 0.0
    router_max_new_token_len: Annotated[
        Count, Meta(description="output length assumed for a request below router_token_ratio")
    ] = 1024
    mode: Annotated[
        tuple[Literal["triton_flashdecoding", "triton_int8kv"], ...],
        Meta(
            description="triton_flashdecoding: split-K decode attention; triton_int8kv (or ppl_int8kv): "
            "KV cache in int8"
        ),
    ] = ("triton_flashdecoding",)
    disable_cudagraph: Annotated[bool, Meta(description="run LLM steps without CUDA graphs")] = False
    graph_max_batch_size: Annotated[Count, Meta(description="largest batch with a CUDA graph")] = 128
    graph_max_len_in_batch: Annotated[Count, Meta(description="longest request in a CUDA graph")] = 8192

    # -- streaming
    stream_hop: Annotated[
        Literal["fixed", "grow"],
        Meta(
            description="chunks of a streamed answer: fixed (25 tokens) or grow (25, 50, 100 tokens; the "
            "last chunk with full attention), which answers as early and costs less on a GPU, more on a CPU"
        ),
    ] = "fixed"
    flow_memory_mb: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(
            description="on a CPU, MiB for what a decode process keeps of streams and voices (8 a second "
            "with the voice that comes with Light-TTS), so that a chunk costs only its own frames"
        ),
    ] = 1024
    flow_memory_gpu_mb: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(
            description="the same on a GPU, taken at the start (about 110 MiB a second of speech with "
            "CosyVoice2-0.5B in 16 bits); 0: every chunk is computed from the beginning; not with TensorRT"
        ),
    ] = 0

    # -- operation
    log_dir: Annotated[str, Meta(description="directory of light-tts.log; empty: console only")] = "logs"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least level that is logged")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="of the log's lines; json: an object each")
    ] = "text"
    log_stats_interval: Annotated[Seconds, Meta(description="seconds between throughput lines")] = 10.0
    disable_log_stats: Annotated[bool, Meta(description="no throughput lines")] = False
    hang_timeout_gpu: Annotated[
        Seconds,
        Meta(description="seconds without progress after which a stage on a GPU is killed and started again"),
    ] = 10.0
    hang_timeout_cpu: Annotated[
        Seconds,
        Meta(
            description="seconds without progress after which a stage on the CPU is killed and started again"
        ),
    ] = 30.0
    health_monitor: Annotated[
        bool,
        Meta(
            description="ask /health regularly; after 3 failures in a row restart the stages they are due to"
        ),
    ] = False
    health_check_interval: Annotated[
        Seconds, Meta(description="seconds between the health monitor's questions")
    ] = 88.0

    @property
    def prefill_tokens(self) -> int:
        """Most tokens of one prefill batch."""
        return self.batch_max_tokens or max(self.max_total_token_num // 6, self.max_req_total_len)

    @property
    def alive_requests(self) -> int:
        """Most requests running and paused in one LLM process."""
        return self.running_max_req_size or self.gpt_paral_num

    @property
    def int8_kv(self) -> bool:
        return "triton_int8kv" in self.mode

    def check(self) -> None:
        """Raise SettingsError where two settings contradict each other."""
        if self.max_req_total_len > self.max_total_token_num:
            raise SettingsError(
                f"--max_req_total_len {self.max_req_total_len} is above --max_total_token_num "
                f"{self.max_total_token_num}: one request could never fit the KV cache"
            )
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise SettingsError("--ssl_certfile and --ssl_keyfile go together: give both or neither")
        if self.min_prompt_seconds >= self.max_prompt_seconds:
            raise SettingsError(
                f"--min_prompt_seconds {self.min_prompt_seconds} is not below --max_prompt_seconds "
                f"{self.max_prompt_seconds}"
            )
        if self.max_upload_mb > self.max_inflight_upload_mb:
            raise SettingsError(
                f"--max_upload_mb {self.max_upload_mb:g} is above --max_inflight_upload_mb "
                f"{self.max_inflight_upload_mb:g}: the largest body could never be taken"
            )
        if not self.zmq_mode.startswith(("ipc://", "tcp://")):
            raise SettingsError(f"--zmq_mode {self.zmq_mode!r} begins neither with ipc:// nor with tcp://")


def load(path: str) -> Settings:
    """Settings from the JSON file that `save` wrote."""
    with open(path, "rb") as file:
        return msgspec.json.decode(file.read(), type=Settings)


def save(settings: Settings, path: str) -> None:
    with open(path, "wb") as file:
        file.write(msgspec.json.encode(settings))
