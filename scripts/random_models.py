"""Modules at the sizes of CosyVoice2-0.5B with random weights, made on the device: for measuring speed."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from light_tts.models.cosyvoice2.config import Config, load_config
from light_tts.models.cosyvoice2.flow import Flow
from scripts.make_tiny_checkpoint import SIZES, TEMPLATE, flow_shapes

SIZE = SIZES["full"]


def config() -> Config:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cosyvoice2.yaml").write_text(TEMPLATE.read_text().format(**asdict(SIZE)))
        return load_config(Path(folder))


def flow(device: str, seed: int = 0) -> Flow:
    """float32"""
    with torch.device("meta"):
        module = Flow(config().flow, flow_shapes(SIZE))
    module = module.to_empty(device=device).eval().requires_grad_(False)
    fill(module, seed)
    module.decoder.estimator.final_proj.bias -= 5.0  # mel frames about as loud as speech
    return module


def fill(module: nn.Module, seed: int) -> None:
    """Random values that keep signals at about the level at which they come in."""
    generator = None
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if generator is None:
                generator = torch.Generator(tensor.device).manual_seed(seed)
            kind = name.rsplit(".", 1)[-1]
            if kind == "bias" or kind.startswith("pos_bias"):
                tensor.normal_(0, 0.05, generator=generator)
            elif tensor.dim() == 1:  # of a norm
                tensor.normal_(1, 0.1, generator=generator)
            elif "embed" in name.split(".")[-2]:
                tensor.normal_(0, 1, generator=generator)
            else:
                tensor.normal_(0, 1 / math.sqrt(math.prod(tensor.shape[1:])), generator=generator)
