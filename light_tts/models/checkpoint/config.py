"""The parameters in a checkpoint's YAML file that all families have, as frozen dataclasses.

Unknown keys (training settings, keys of later releases) are ignored. A value that these modules do not
implement is an error that names the file and the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from light_tts.common.sampling_rule import SamplingRule
from light_tts.models.checkpoint.hyperyaml import ConfigError, Node
from light_tts.models.checkpoint.inputs import InputFormat

__all__ = ["CommonConfig", "ConfigError"]

DEFAULT_TIMESTEPS = 10
MAX_FRAMES = 15000  # mel frames of prompt and speech covered by the flow's fixed noise: 300 s
DEFAULT_CHUNK_SIZE = 25  # early releases do not specify a chunk size; their models were trained with this one


@dataclass(frozen=True)
class SpecialIds:
    """The special speech ids, which follow the spoken ones. There are `count` of them; none is ever spoken,
    and each of them ends a part that is not bistream. `eos` ends any part, `fill` a block of bistream;
    `held`: ids that may not be sampled before a part has its minimum length. `sos` and `task`: the marks at
    the start of a sequence and before its speech, None: they are not among the speech ids. All are offsets
    from the first special id."""

    count: int
    eos: int
    fill: int
    held: Sequence[int]
    sos: int | None = None
    task: int | None = None


@dataclass(frozen=True)
class LLMConfig:
    input_size: int
    output_size: int
    speech_token_size: int
    mix_ratio: tuple[int, int]  # text tokens : speech tokens of the bistream mode
    sampling: SamplingRule
    special: SpecialIds
    # (layer, head) pairs that attend to the words being spoken
    alignment_heads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CommonFlowConfig:
    """The parameters that the flows of all families have."""

    input_size: int
    output_size: int
    spk_embed_dim: int
    vocab_size: int
    token_mel_ratio: int
    pre_lookahead_len: int
    inference_cfg_rate: float
    n_timesteps: int  # Euler steps


@dataclass(frozen=True)
class HiftConfig:
    in_channels: int
    base_channels: int
    nb_harmonics: int
    sampling_rate: int
    nsf_alpha: float
    nsf_sigma: float
    nsf_voiced_threshold: float
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    istft_n_fft: int
    istft_hop_len: int
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    source_resblock_kernel_sizes: tuple[int, ...]
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    lrelu_slope: float
    audio_limit: float
    f0_in_channels: int
    f0_cond_channels: int
    f0_num_class: int


@dataclass(frozen=True)
class MelConfig:
    """The mel spectrogram produced by the flow and used for prompts. `fmax` None: half the sample rate."""

    n_fft: int
    num_mels: int
    sampling_rate: int
    hop_size: int
    win_size: int
    fmin: float
    fmax: float | None


@dataclass(frozen=True)
class CommonConfig:
    """The parameters that checkpoints of all families have. inputs: what the models take as input."""

    inputs: ClassVar[InputFormat]
    path: Path
    sample_rate: int
    token_frame_rate: int
    token_mel_ratio: int
    chunk_size: int  # speech tokens per streaming chunk
    spk_embed_dim: int
    instructions: bool  # trained with instructions on how to speak
    llm: LLMConfig
    mel: MelConfig

    @property
    def samples_per_token(self) -> int:
        return self.sample_rate // self.token_frame_rate

    @property
    def frames_per_token(self) -> int:
        return self.token_mel_ratio

    @property
    def samples_per_frame(self) -> int:
        return self.mel.hop_size


def common(root: Node, special: SpecialIds, flow: CommonFlowConfig, chunk_size: int) -> dict[str, Any]:
    """Return the fields of CommonConfig."""
    return {
        "path": root.file,
        "sample_rate": root.int("sample_rate"),
        "token_frame_rate": root.int("token_frame_rate", root.node("flow").int("input_frame_rate", 25)),
        "instructions": root.bool("instructions", True),
        "llm": _llm(root.node("llm"), root, special),
        "mel": _mel(root.node("feat_extractor")),
        "token_mel_ratio": flow.token_mel_ratio,
        "chunk_size": chunk_size,
        "spk_embed_dim": flow.spk_embed_dim,
    }


def _llm(llm: Node, root: Node, special: SpecialIds) -> LLMConfig:
    mix_ratio = llm.ints("mix_ratio") if "mix_ratio" in llm else (5, 15)
    if len(mix_ratio) != 2 or min(mix_ratio) < 1:
        raise llm.error("mix_ratio", f"expected two positive numbers, found {list(mix_ratio)}")
    return LLMConfig(
        input_size=llm.int("llm_input_size"),
        output_size=llm.int("llm_output_size"),
        speech_token_size=llm.int("speech_token_size"),
        mix_ratio=mix_ratio,
        sampling=_sampling(llm.node("sampling")),
        special=special,
        alignment_heads=_alignment_heads(root),
    )


def _alignment_heads(root: Node) -> tuple[tuple[int, int], ...]:
    heads = root.int_lists("alignment_heads") if "alignment_heads" in root else ()
    if not all(len(head) == 2 and min(head) >= 0 for head in heads):
        raise root.error("alignment_heads", f"expected pairs of a layer and a head, found {list(heads)}")
    return tuple((layer, head) for layer, head in heads)


def _sampling(sampling: Node) -> SamplingRule:
    rule = SamplingRule(
        top_p=sampling.float("top_p"),
        top_k=sampling.int("top_k"),
        win_size=sampling.int("win_size"),
        tau_r=sampling.float("tau_r"),
        temperature=sampling.float("temperature", 1.0),
    )
    for name, value in vars(rule).items():
        if value <= 0:
            raise sampling.error(name, f"expected a positive number, found {value}")
    return rule


def common_flow(flow: Node) -> dict[str, Any]:
    """Return the fields of CommonFlowConfig."""
    decoder = flow.node("decoder")
    cfm = decoder.node("cfm_params")
    if "content" in cfm:
        cfm = cfm.node("content")
    cfm.require("solver", "euler")
    cfm.require("t_scheduler", "cosine")
    decoder.require("n_spks", 1)
    return {
        "input_size": flow.int("input_size"),
        "output_size": flow.int("output_size"),
        "spk_embed_dim": flow.int("spk_embed_dim"),
        "vocab_size": flow.int("vocab_size"),
        "token_mel_ratio": flow.int("token_mel_ratio", 2),
        "pre_lookahead_len": flow.int("pre_lookahead_len"),
        "inference_cfg_rate": cfm.float("inference_cfg_rate"),
        "n_timesteps": _timesteps(cfm),
    }


def _timesteps(cfm: Node) -> int:
    """Return the number of Euler steps; released checkpoints do not specify it."""
    steps = cfm.int("n_timesteps", DEFAULT_TIMESTEPS)
    if steps < 1:
        raise cfm.error("n_timesteps", f"expected a positive number, found {steps}")
    return steps


def hift(node: Node) -> dict[str, Any]:
    """Return the fields of HiftConfig."""
    istft, f0 = node.node("istft_params"), node.node("f0_predictor")
    return dict(
        in_channels=node.int("in_channels"),
        base_channels=node.int("base_channels"),
        nb_harmonics=node.int("nb_harmonics"),
        sampling_rate=node.int("sampling_rate"),
        nsf_alpha=node.float("nsf_alpha"),
        nsf_sigma=node.float("nsf_sigma"),
        nsf_voiced_threshold=node.float("nsf_voiced_threshold"),
        upsample_rates=node.ints("upsample_rates"),
        upsample_kernel_sizes=node.ints("upsample_kernel_sizes"),
        istft_n_fft=istft.int("n_fft"),
        istft_hop_len=istft.int("hop_len"),
        resblock_kernel_sizes=node.ints("resblock_kernel_sizes"),
        resblock_dilation_sizes=node.int_lists("resblock_dilation_sizes"),
        source_resblock_kernel_sizes=node.ints("source_resblock_kernel_sizes"),
        source_resblock_dilation_sizes=node.int_lists("source_resblock_dilation_sizes"),
        lrelu_slope=node.float("lrelu_slope"),
        audio_limit=node.float("audio_limit"),
        f0_in_channels=f0.int("in_channels"),
        f0_cond_channels=f0.int("cond_channels"),
        f0_num_class=f0.int("num_class"),
    )


def _mel(mel: Node) -> MelConfig:
    mel.require("center", False)
    return MelConfig(
        n_fft=mel.int("n_fft"),
        num_mels=mel.int("num_mels"),
        sampling_rate=mel.int("sampling_rate"),
        hop_size=mel.int("hop_size"),
        win_size=mel.int("win_size"),
        fmin=mel.float("fmin"),
        fmax=mel.optional_float("fmax"),
    )


def check_rates(config: CommonConfig, root: Node, flow: CommonFlowConfig, hift: HiftConfig) -> None:
    """Raise ConfigError if the components do not match; otherwise this would become apparent only by
    listening."""
    mel = config.mel
    if mel.sampling_rate != config.sample_rate or hift.sampling_rate != config.sample_rate:
        raise root.error("sample_rate", "differs from feat_extractor.sampling_rate or hift.sampling_rate")
    if not mel.num_mels == flow.output_size == hift.in_channels:
        raise root.error("flow.output_size", "differs from feat_extractor.num_mels or hift.in_channels")
    if config.sample_rate != config.token_frame_rate * config.token_mel_ratio * mel.hop_size:
        raise root.error(
            "token_mel_ratio", "token_frame_rate * token_mel_ratio * hop_size is not sample_rate"
        )
    hop = hift.istft_hop_len
    for rate in hift.upsample_rates:
        hop *= rate
    if hop != mel.hop_size:
        raise root.error(
            "hift.upsample_rates", f"make {hop} samples a frame, feat_extractor.hop_size {mel.hop_size}"
        )
