"""The full-size modules have exactly the tensors of the released checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from light_tts.models.checkpoint.cosyvoice2_config import Config, load_config
from light_tts.models.checkpoint.cosyvoice3_config import Config3, DiTConfig, load_config3
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.flow import Flow, FlowShapes
from light_tts.models.llm.speech_lm import Qwen2Config, SpeechLM
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.hift import Hift

GOLDEN = Path(__file__).parents[1] / "golden"
COSYVOICE3 = "Fun-CosyVoice3-0.5B"
QWEN2_0_5B = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=151936,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("full_size")
    (folder / "cosyvoice2.yaml").symlink_to(GOLDEN / "full_size.yaml")
    return load_config(folder)


@pytest.fixture(scope="module")
def config3() -> Config3:
    """Return the parameters of the small checkpoint: there is no full-size file of this family."""
    return load_config3(GOLDEN / "cosyvoice3" / "checkpoint")


def manifest(part: str, release: str = "CosyVoice2-0.5B") -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a released file."""
    with open(GOLDEN / "state_dict" / f"{release}.{part}.tsv", newline="") as file:
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


def test_hift_has_the_tensors_of_the_release(config: Config) -> None:
    with torch.device("meta"):
        hift = Hift(config.hift)
    assert shapes(hift) == manifest("hift")


def test_llm_has_the_tensors_of_the_release(config: Config) -> None:
    with torch.device("meta"):
        llm = SpeechLM(QWEN2_0_5B, config.llm)
    assert shapes(llm) == manifest("llm")


def test_flow_of_cosyvoice3_has_the_tensors_of_the_release(config3: Config3) -> None:
    dit = DiTConfig(dim=1024, depth=22, heads=16, dim_head=64, ff_mult=2, static_chunk_size=50)
    config = dataclasses.replace(config3.flow, vocab_size=6561, lookahead_channels=1024, estimator=dit)
    with torch.device("meta"):
        flow = DiTFlow(config)
    assert shapes(flow) == manifest("flow", COSYVOICE3)


def test_hift_of_cosyvoice3_has_the_tensors_of_the_release(config3: Config3) -> None:
    config = dataclasses.replace(config3.hift, base_channels=512, f0_cond_channels=512)
    with torch.device("meta"):
        hift = CausalHift(config)
    assert list(shapes(hift).items()) == list(manifest("hift", COSYVOICE3).items())  # in this order


def test_llm_of_cosyvoice3_has_the_tensors_of_the_release(config3: Config3) -> None:
    config = dataclasses.replace(config3.llm, input_size=896, output_size=896, speech_token_size=6561)
    with torch.device("meta"):
        llm = SpeechLM(QWEN2_0_5B, config)
    assert shapes(llm) == manifest("llm", COSYVOICE3)


def test_loading_the_models_does_not_import_pytorchs_compiler():
    """Which takes a second."""
    script = """
import sys
from pathlib import Path
import torch
from light_tts.models.family import load_family
from light_tts.models.flow_options import FlowOptions
folder = Path(sys.argv[1])
family, cpu = load_family(folder), torch.device("cpu")
family.load_llm(folder / "llm.pt", cpu, torch.float32)
family.load_flow(cpu, torch.float32, FlowOptions(max_batch_size=1))
family.load_vocoder(cpu, 8)
print("torch._dynamo" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, "test/golden/cosyvoice2/checkpoint"], capture_output=True, text=True
    )
    assert ended.stdout.strip() == "False", ended.stderr
