"""The parameters in a checkpoint's `cosyvoice3.yaml`, as frozen dataclasses (see config.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from light_tts.models.checkpoint import hyperyaml
from light_tts.models.checkpoint.config import (
    DEFAULT_CHUNK_SIZE,
    CommonConfig,
    CommonFlowConfig,
    HiftConfig,
    SpecialIds,
    check_rates,
    common,
    common_flow,
    hift,
)
from light_tts.models.checkpoint.hyperyaml import Node
from light_tts.models.checkpoint.inputs import COSYVOICE3_INPUTS

YAML_NAME = "cosyvoice3.yaml"
# The start of the sequence, the end of speech, the task, the fill and 196 ids without a use. Any of them ends
# a part, so none may be sampled before the minimum length.
COSYVOICE3_IDS = SpecialIds(count=200, eos=1, fill=3, held=range(200), sos=0, task=2)


@dataclass(frozen=True)
class DiTConfig:
    dim: int
    depth: int
    heads: int
    dim_head: int
    ff_mult: int
    static_chunk_size: int  # attention chunk in streaming mode, in mel frames


@dataclass(frozen=True)
class DiTFlowConfig(CommonFlowConfig):
    """`lookahead_channels`: hidden channels of the look-ahead layer."""

    lookahead_channels: int
    estimator: DiTConfig


@dataclass(frozen=True)
class CausalHiftConfig(HiftConfig):
    """`conv_pre_look_right`: mel frames after a frame that the first convolution sees."""

    conv_pre_look_right: int


@dataclass(frozen=True)
class Config3(CommonConfig):
    """That of a CosyVoice3 checkpoint."""

    inputs = COSYVOICE3_INPUTS
    flow: DiTFlowConfig
    hift: CausalHiftConfig


def is_cosyvoice3(model_dir: Path) -> bool:
    """Return whether this is the directory of a CosyVoice3 checkpoint."""
    return (Path(model_dir) / YAML_NAME).is_file()


def load_config3(model_dir: Path) -> Config3:
    """Read `<model_dir>/cosyvoice3.yaml`. Raises ConfigError naming the file and the key."""
    root = hyperyaml.load(Path(model_dir) / YAML_NAME)
    chunk_size = root.int("chunk_size", DEFAULT_CHUNK_SIZE)
    flow = _flow(root.node("flow"), chunk_size)
    vocoder = root.node("hift")
    config = Config3(
        **common(root, COSYVOICE3_IDS, flow, chunk_size),
        flow=flow,
        hift=CausalHiftConfig(**hift(vocoder), conv_pre_look_right=vocoder.int("conv_pre_look_right")),
    )
    check_rates(config, root, config.flow, config.hift)
    return config


def _flow(flow: Node, chunk_size: int) -> DiTFlowConfig:
    shared = common_flow(flow)
    return DiTFlowConfig(
        **shared,
        lookahead_channels=flow.node("pre_lookahead_layer").int("channels"),
        estimator=_estimator(flow.node("decoder").node("estimator"), chunk_size * shared["token_mel_ratio"]),
    )


def _estimator(estimator: Node, chunk_size: int) -> DiTConfig:
    estimator.require("num_decoding_left_chunks", -1)
    config = DiTConfig(
        dim=estimator.int("dim"),
        depth=estimator.int("depth"),
        heads=estimator.int("heads"),
        dim_head=estimator.int("dim_head"),
        ff_mult=estimator.int("ff_mult"),
        static_chunk_size=estimator.int("static_chunk_size", chunk_size),
    )
    if config.heads * config.dim_head != config.dim:
        raise estimator.error("dim_head", f"times heads is not dim {config.dim}")
    return config
