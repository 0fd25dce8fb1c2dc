"""The packages that the processes import before the server is ready; importing large ones delays it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECKPOINT = "test/golden/cosyvoice2/checkpoint"
ENCODE = f"""
from pathlib import Path
from light_tts.models.family import load_family
from light_tts.server.core import stage_main
from light_tts.server.tts_encode import manager, stage
frontend = load_family(Path("{CHECKPOINT}")).load_frontend({{}}, 1)
frontend.split_text("Hello, world.")
"""


def imported(code: str) -> set[str]:
    """Return the top-level packages that a process has imported after this code."""
    code += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.splitlines()[-1].split())


def test_encode_imports_neither_transformers_nor_what_it_imports():
    found = imported(ENCODE)
    assert "tokenizers" in found
    assert not found & {"transformers", "huggingface_hub", "sklearn", "scipy", "torchvision", "jinja2"}


@pytest.mark.parametrize("stage", ["llm", "decode"])
def test_other_stages_import_nothing_of_the_frontend(stage: str):
    found = imported(f"from light_tts.server.tts_{stage} import manager, stage")
    assert not found & {"transformers", "tokenizers", "onnxruntime", "wetext", "soundfile"}


@pytest.mark.parametrize("family", ["cosyvoice2", "cosyvoice3"])
def test_on_a_cpu_no_stage_needs_triton(family: str):
    """Only the test dependencies and PyTorch for CUDA bring it along."""
    code = f"""
import sys
sys.modules["triton"] = None  # importing it fails
from pathlib import Path
import torch
from light_tts.models.family import load_family
from light_tts.models.flow_options import FlowOptions
from light_tts.server.tts_decode import manager, stage
from light_tts.server.tts_llm import manager, stage
from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.options import EngineOptions
family, cpu = load_family(Path("test/golden/{family}/checkpoint")), torch.device("cpu")
family.load_flow(cpu, torch.float32, FlowOptions(max_batch_size=1))()
family.load_vocoder(cpu, 8)()
model = family.load_llm(Path("test/golden/{family}/checkpoint/llm.pt"), cpu, torch.float32)
LLMEngine(model, EngineOptions(slots=64, rows=1, max_len=64))
"""
    assert "torch" in imported(code)


@pytest.mark.parametrize("module", ["api_server", "supervision.supervisor"])
def test_the_stages_are_started_by_processes_without_numpy_and_a_web_framework(module: str):
    found = imported(f"import light_tts.server.{module}")
    assert not found & {"numpy", "torch", "fastapi", "starlette", "pydantic", "av", "httpx", "soundfile"}


def test_http_workers_import_no_client_unless_recordings_are_fetched():
    found = imported("import light_tts.server.api_http")
    assert "fastapi" in found
    assert not found & {"httpx", "rich", "torch", "transformers", "onnxruntime"}
