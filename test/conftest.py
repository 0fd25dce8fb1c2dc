"""Fixtures shared by several test files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support import interpreter
from support.server_process import FEW_STEPS, LARGE, Server, launch, start_server
from support.streams import run_clients
from support.styles import STYLES, checkpoint_with

torch.backends.cudnn.allow_tf32 = False  # as in the server
if not interpreter.GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any is imported
    interpreter.patch_language_once()

LONGEST = (
    "test_poison",
    "test_recovery",
    "test_http_api",
    "test_websocket",
    "test_lifecycle",
    "test_upstream_weaknesses",
    "test_command",
    "test_takeover",
    "test_scripts",
    "test_hift_runner",
    "test_causal_runner",
    "test_hangs",
    "test_resnet_block",
    "test_token2wav",
    "test_tensor_linear",
    "test_llm_kernels",
    "test_mps",
    "test_decode_stage",
    "test_llm_triton",
    "test_flow_kernels",
    "test_cosyvoice3",
)

# Files that share one of the servers below. With several workers, those of a group run on the same one.
GROUPS = {
    "server": (
        *("test_access", "test_cosyvoice", "test_docs", "test_evaluate", "test_lifecycle", "test_live"),
        *("test_malformed", "test_monitoring", "test_openai", "test_openai_js", "test_realtime"),
        *("test_search_sampling", "test_takeover", "test_tools", "test_voice_agents", "test_voices"),
    ),
    "mortal_server": ("test_http_api", "test_poison", "test_recovery", "test_websocket"),
    "styles_server": ("test_no_speech", "test_upstream_weaknesses"),
    "voice_server": ("test_command", "test_page", "test_speech_quality", "test_voice", "test_word_times"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With `--dist loadfile`, keep the files of a group together, too, so that their server starts once."""
    from xdist.scheduler import LoadFileScheduling

    group_of = {file: group for group, files in GROUPS.items() for file in files}

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return group_of.get(Path(file).stem, file)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that with several workers none is left alone with one at the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A folder for sockets, whose paths must be short; `tmp_path` may be too long."""
    with tempfile.TemporaryDirectory(prefix="ltts-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A real server on the small golden checkpoint with two HTTP workers and two decode processes."""
    with start_server(httpserver_workers=2, decode_process_num=2) as running:
        yield running


@pytest.fixture(scope="session")
def voice_server() -> Iterator[Server]:
    """A real server with the bundled voice, which it finds when nothing is said about the model."""
    with launch(model_dir=None) as running:
        yield running


@pytest.fixture(scope="session")
def strict_server() -> Iterator[Server]:
    """A real server with low limits."""
    limits = {"request_timeout": 3, "max_upload_mb": 0.5, "max_text_length": 60, "max_prompt_seconds": 5}
    with start_server(**limits, max_part_tokens=3500, **FEW_STEPS) as running:
        yield running


@pytest.fixture(scope="session")
def styles_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server with all styles of support/styles.py, two requests at a time in each, and room for one
    prompt only."""
    model = checkpoint_with(*STYLES, folder=tmp_path_factory.mktemp("model"))
    with start_server(model_dir=model, gpt_paral_num=2, cache_capacity=1, **LARGE, **FEW_STEPS) as running:
        yield running


@pytest.fixture(scope="session")
def mortal_server() -> Iterator[Server]:
    """A real server, like `server`, whose processes are killed by tests."""
    with start_server(httpserver_workers=2, decode_process_num=2, **FEW_STEPS) as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(mortal_server: Server) -> list[np.ndarray]:
    """The samples of the clients (support/streams.py) while no process is killed."""
    return run_clients(mortal_server)
