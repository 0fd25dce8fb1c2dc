"""The flows of both families, for tests of what they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.flow import pack as unet
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.dit import pack as dit
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.encoder_table import TableEncoder
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.step_estimator import StepEstimator
from light_tts.tools.parity import Golden

GOLDENS = {name: Golden(Path(__file__).parents[1] / "golden" / name) for name in ("cosyvoice2", "cosyvoice3")}
FAMILIES = tuple(GOLDENS)
# of a test with a fixture `family` that has both
ONLY_UNET, ONLY_DIT = (pytest.mark.parametrize("family", [name], indirect=True) for name in FAMILIES)


def load_flow(
    family: str, device: torch.device, dtype: torch.dtype = torch.float32, steps: int | None = None
) -> BaseFlow:
    """Return the flow of the golden checkpoint of a family. steps: of Euler; None: as many as it says."""
    checkpoint = GOLDENS[family].checkpoint

    def changed(config: Any) -> Any:
        return config if steps is None else replace(config, flow=replace(config.flow, n_timesteps=steps))

    if family == "cosyvoice2":
        return Flow.from_checkpoint(checkpoint, changed(load_config(checkpoint)), device, dtype)
    return DiTFlow.from_checkpoint(checkpoint, changed(load_config3(checkpoint)), device, dtype)


def pack(flow: BaseFlow, dtype: torch.dtype) -> tuple[StepEstimator[Any], TableEncoder]:
    """Return estimator and encoder of a flow in float32 for the packed one."""
    if isinstance(flow, DiTFlow):
        return dit.pack(flow, dtype)
    assert isinstance(flow, Flow)
    return unet.pack(flow, dtype)
