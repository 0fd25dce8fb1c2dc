"""The parameters in a checkpoint's `cosyvoice2.yaml`, as frozen dataclasses (see config.py)."""

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
from light_tts.models.checkpoint.inputs import COSYVOICE2_INPUTS

YAML_NAME = "cosyvoice2.yaml"
COSYVOICE2_IDS = SpecialIds(count=3, eos=0, fill=2, held=(0,))  # the second one is unused


@dataclass(frozen=True)
class EncoderConfig:
    input_size: int
    output_size: int
    attention_heads: int
    linear_units: int
    num_blocks: int
    static_chunk_size: int  # attention chunk in streaming mode, in tokens


@dataclass(frozen=True)
class EstimatorConfig:
    in_channels: int
    out_channels: int
    channels: int
    attention_head_dim: int
    n_blocks: int
    num_mid_blocks: int
    num_heads: int
    static_chunk_size: int  # attention chunk in streaming mode, in mel frames


@dataclass(frozen=True)
class FlowConfig(CommonFlowConfig):
    encoder: EncoderConfig
    estimator: EstimatorConfig


@dataclass(frozen=True)
class Config(CommonConfig):
    """That of a CosyVoice2 checkpoint."""

    inputs = COSYVOICE2_INPUTS
    flow: FlowConfig
    hift: HiftConfig


def load_config(model_dir: Path) -> Config:
    """Read `<model_dir>/cosyvoice2.yaml`. Raises ConfigError naming the file and the key."""
    root = hyperyaml.load(Path(model_dir) / YAML_NAME)
    chunk_size = root.int("chunk_size", _encoder_chunk_size(root))
    flow = _flow(root.node("flow"), chunk_size)
    config = Config(
        **common(root, COSYVOICE2_IDS, flow, chunk_size),
        flow=flow,
        hift=HiftConfig(**hift(root.node("hift"))),
    )
    check_rates(config, root, config.flow, config.hift)
    return config


def _encoder_chunk_size(root: Node) -> int:
    return root.node("flow").node("encoder").int("static_chunk_size", DEFAULT_CHUNK_SIZE)


def _flow(flow: Node, chunk_size: int) -> FlowConfig:
    shared = common_flow(flow)
    return FlowConfig(
        **shared,
        encoder=_encoder(flow.node("encoder"), chunk_size),
        estimator=_estimator(flow.node("decoder").node("estimator"), chunk_size * shared["token_mel_ratio"]),
    )


def _encoder(encoder: Node, chunk_size: int) -> EncoderConfig:
    encoder.require("normalize_before", True)
    encoder.require("input_layer", "linear")
    encoder.require("pos_enc_layer_type", "rel_pos_espnet")
    encoder.require("selfattention_layer_type", "rel_selfattn")
    encoder.require("use_cnn_module", False)
    encoder.require("macaron_style", False)
    config = EncoderConfig(
        input_size=encoder.int("input_size"),
        output_size=encoder.int("output_size"),
        attention_heads=encoder.int("attention_heads"),
        linear_units=encoder.int("linear_units"),
        num_blocks=encoder.int("num_blocks"),
        static_chunk_size=encoder.int("static_chunk_size", chunk_size),
    )
    if config.output_size % config.attention_heads:
        raise encoder.error("attention_heads", f"does not divide output_size {config.output_size}")
    return config


def _estimator(estimator: Node, chunk_size: int) -> EstimatorConfig:
    estimator.require("act_fn", "gelu")
    estimator.require("num_decoding_left_chunks", -1)
    channels = estimator.ints("channels")
    if len(channels) != 1:
        raise estimator.error("channels", f"only one level is supported, found {list(channels)}")
    return EstimatorConfig(
        in_channels=estimator.int("in_channels"),
        out_channels=estimator.int("out_channels"),
        channels=channels[0],
        attention_head_dim=estimator.int("attention_head_dim"),
        n_blocks=estimator.int("n_blocks"),
        num_mid_blocks=estimator.int("num_mid_blocks"),
        num_heads=estimator.int("num_heads"),
        static_chunk_size=estimator.int("static_chunk_size", chunk_size),
    )
