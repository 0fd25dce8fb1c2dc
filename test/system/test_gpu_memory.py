"""How much of a GPU the flow's cached state takes (--flow_memory_gpu_mb), by the size of the GPU and the
processes on it."""

from __future__ import annotations

import pytest
import torch
from support.server_process import CHECKPOINT

from light_tts.server.core.gpu_memory import automatic_flow_memory, flow_memory
from light_tts.server.core.settings import Settings

GIB = 1 << 30


def settings(**given) -> Settings:
    return Settings(model_dir=str(CHECKPOINT), **given)


@pytest.mark.parametrize(
    ("total", "free", "decode", "limit", "expected"),
    [
        pytest.param(140, 139, 1, 64, 28, id="a fifth of the GPU"),
        pytest.param(80, 79, 1, 36, 16, id="a fifth of a smaller one"),
        pytest.param(80, 79, 2, 24, 8, id="two processes"),
        pytest.param(288, 280, 1, 132, 40_000 / 1024, id="no more than 40,000 MiB"),
        pytest.param(80, 79, 1, 80, 16, id="alone on it"),
        pytest.param(80, 79, 1, 18, 9, id="many styles: half of what it may allocate"),
        pytest.param(80, 20, 1, 36, 10, id="in use by others: half of what is free"),
        pytest.param(80, 20, 2, 24, 5, id="half of its part of what is free"),
        pytest.param(16, 15, 1, 7, 3, id="4 GiB are left for everything else"),
        pytest.param(8, 8, 1, 3.5, 0, id="too small a GPU"),
        pytest.param(80, 3, 1, 36, 0, id="nearly full"),
    ],
)
def test_automatic_size(total, free, decode, limit, expected):
    found = automatic_flow_memory(int(total * GIB), int(free * GIB), decode, int(limit * GIB))
    assert found == pytest.approx(expected * GIB, abs=1)


@pytest.mark.parametrize("total", [0, 4, 8, 12, 16, 24, 40, 48, 80, 141, 180, 288])
@pytest.mark.parametrize(("llm", "decode"), [(1, 1), (3, 1), (1, 3), (0, 1), (0, 4)])
def test_the_others_keep_most_of_any_gpu(total, llm, decode):
    limit = int(total * GIB * 0.92) // (llm + decode)
    found = automatic_flow_memory(total * GIB, total * GIB, decode, limit)
    assert 0 <= found * decode <= min(total * GIB / 5, 40_000 << 20)
    assert found == 0 or limit - found >= max(found, 4 * GIB)


@pytest.mark.parametrize(
    ("gpus", "device", "decode", "expected"),
    [(1, 0, 1, 16), (1, 0, 2, 8), (2, 0, 2, 16), (2, 1, 2, 16), (2, 0, 3, 8), (2, 1, 3, 16)],
)
def test_processes_on_the_same_gpu_share_what_it_gives(monkeypatch, gpus, device, decode, expected):
    """GPUs of 80 GiB, whose driver is not here. One process of the LLM is on GPU 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * GIB, 80 * GIB))
    found = flow_memory(settings(decode_process_num=decode), torch.device("cuda", device))
    assert found == expected * GIB


def test_a_given_size_is_taken_as_it_is_and_a_cpu_gets_none():
    cpu = torch.device("cpu")
    assert flow_memory(settings(), cpu) == 0
    assert flow_memory(settings(flow_memory_gpu_mb=0), torch.device("cuda", 0)) == 0
    assert flow_memory(settings(flow_memory_gpu_mb=512), torch.device("cuda", 0)) == 512 << 20
