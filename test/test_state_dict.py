"""The full-size modules have exactly the tensors of the released checkpoints."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from light_tts.models.cosyvoice2.config import Config, load_config
from light_tts.models.cosyvoice2.flow import Flow, FlowShapes

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("full_size")
    (folder / "cosyvoice2.yaml").symlink_to(GOLDEN / "full_size.yaml")
    return load_config(folder)


def manifest(part: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a released file."""
    with open(GOLDEN / "state_dict" / f"CosyVoice2-0.5B.{part}.tsv", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {row["name"]: tuple(int(size) for size in row["shape"].split("x") if size) for row in rows}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_flow_has_the_tensors_of_the_release(config: Config) -> None:
    expected = manifest("flow")
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in expected.items()}
        flow = Flow(config.flow, FlowShapes.from_state(state, Path("flow.pt")))
    assert shapes(flow) == expected
