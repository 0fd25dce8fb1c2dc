"""The checkpoint that the trainings produce: its sizes, configuration and directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from light_tts.models.checkpoint.cosyvoice2_config import Config, load_config
from light_tts.models.flow.flow import FlowShapes
from light_tts.models.llm.speech_lm import BACKBONE_DIR, Qwen2Config
from light_tts.tools.tiny_checkpoint import SMALL_PARTS, TEMPLATE, CheckpointSizes, flow_shapes

MINI = CheckpointSizes(
    hidden_size=256,
    speech_token_size=729,  # 3^6
    encoder_size=192,
    encoder_heads=4,
    encoder_units=576,
    encoder_blocks=3,
    estimator_channels=160,
    estimator_head_dim=40,
    estimator_heads=4,
    estimator_blocks=1,
    estimator_mid_blocks=4,
    hift_channels=192,
    f0_channels=192,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1024,
    up_blocks=3,
    lookahead_channels=192,
    # Measured on 40 sentences: 4.5 and 6.1 % WER with two sets of seeds; 12.3 % with the defaults.
    top_p=0.5,
    top_k=8,
    tau_r=0.2,
    # Euler steps. Measured on 100 sentences: 3 and 4 have the same WER, similarity and naturalness as 6; 2
    # does not.
    n_timesteps=4,
)
# The last text ids: END_OF_TEXT itself and those of `TextTokenizer`.
SPECIAL_IDS = 20
END_OF_TEXT = MINI.vocab_size - SPECIAL_IDS
# (layer, head) of the language model that is trained to look at the words that are being spoken. The
# configuration has them under `alignment_heads`, so that times of words can be read from a checkpoint, after
# `instructions: False`: it knows no instruction how to speak and would read one aloud.
ALIGNMENT_HEADS = ((1, 2), (1, 3))  # they did so most before this was trained


def checkpoint_folder(work: Path) -> Path:
    return work / "checkpoint"


def training_file(work: Path, name: str) -> Path:
    """Return the path of a training's weights."""
    (work / "training").mkdir(parents=True, exist_ok=True)
    return work / "training" / f"{name}.pt"


def sizes(work: Path) -> CheckpointSizes:
    """Return MINI with the vocabulary of the checkpoint's text tokenizer, if there is one; more languages
    need a larger one."""
    vocabulary = checkpoint_folder(work) / BACKBONE_DIR / "vocab.json"
    if not vocabulary.exists():
        return MINI
    return replace(MINI, vocab_size=len(json.loads(vocabulary.read_text("utf-8"))) + SPECIAL_IDS)


def write_config(work: Path) -> tuple[Config, Qwen2Config, FlowShapes]:
    """Write the configuration files of the checkpoint; return what is read from them."""
    folder, found = checkpoint_folder(work), sizes(work)
    (folder / BACKBONE_DIR).mkdir(parents=True, exist_ok=True)
    template = TEMPLATE.read_text().replace("random weights in the layout", "a small model in the layout")
    ours = f"instructions: False\nalignment_heads: {[list(head) for head in ALIGNMENT_HEADS]}\n"
    _write(folder / "cosyvoice2.yaml", template.format(**asdict(found)) + ours)
    backbone = json.loads((SMALL_PARTS / BACKBONE_DIR / "config.json").read_text())
    backbone.update({name: value for name, value in asdict(found).items() if name in backbone})
    end_of_text = found.vocab_size - SPECIAL_IDS
    backbone.update(bos_token_id=end_of_text, eos_token_id=end_of_text)
    _write(folder / BACKBONE_DIR / "config.json", json.dumps(backbone, indent=2))
    return load_config(folder), Qwen2Config.load(folder), flow_shapes(found)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write tensors as float16; tensors that share memory continue to."""
    halves = {value: value.half() for value in weights.values()}
    torch.save({name: halves[value] for name, value in weights.items()}, path)
    return path


def halves(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with all floating-point tensors as float16, for a file from which training
    resumes.
    """
    return {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}


def _write(path: Path, text: str) -> None:
    """Write atomically: parallel trainings write the same file and read it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    unfinished.write_text(text)
    unfinished.replace(path)
