"""The language model with its linear layers in CUDA C++ computes what it computes with those in Triton."""

from __future__ import annotations

import pytest
import torch
from support import cuda_on_cpu
from torch import Tensor

pytest.importorskip("triton")
from support.tensor_linear_on_cpu import Emulator

from light_tts.common.kv_pool import KVPool, LayerPool
from light_tts.common.sampling_rule import GREEDY
from light_tts.kernels import configs
from light_tts.kernels.cuda.kernel import available
from light_tts.kernels.llm import tensor_linear
from light_tts.models.checkpoint.config import LLMConfig
from light_tts.models.checkpoint.cosyvoice2_config import COSYVOICE2_IDS
from light_tts.models.checkpoint.cosyvoice3_config import COSYVOICE3_IDS
from light_tts.models.llm.fused import FusedLM
from light_tts.models.llm.speech_lm import Qwen2Config, SpeechLM

GPU = torch.cuda.is_available() and available(torch.device("cuda", torch.cuda.current_device()))
DEVICE = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
HEADS, KV_HEADS, HEAD = 4, 2, 16
pytestmark = pytest.mark.skipif(
    not GPU and not cuda_on_cpu.AVAILABLE, reason="needs a GPU, or g++ on Linux, x86-64"
)


@pytest.fixture(params=[COSYVOICE2_IDS, COSYVOICE3_IDS], ids=["cosyvoice2", "cosyvoice3"])
def model(request: pytest.FixtureRequest) -> SpeechLM:
    backbone = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        vocab_size=50,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    torch.manual_seed(0)
    config = LLMConfig(64, 64, 39, (5, 15), GREEDY, request.param)
    return SpeechLM(backbone, config).half().to(DEVICE).requires_grad_(False).merge_embeddings().eval()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory)


@pytest.fixture
def use_up_to(monkeypatch: pytest.MonkeyPatch, emulator: Emulator):
    """-> use the kernel for up to this number of rows, from a first one on"""
    if not GPU:
        monkeypatch.setattr(tensor_linear, "_kernel", emulator.kernel)
        monkeypatch.setattr(tensor_linear, "available", lambda device: True)

    def use(rows: int, first: int = 1) -> None:
        known = configs.load(DEVICE)
        changed = {**known, "tensor_linear": [{"first": first, "rows": rows}]}
        monkeypatch.setattr(configs, "load", lambda _: changed)
        tensor_linear.linear_config.cache_clear()

    return use


def fused(model: SpeechLM) -> FusedLM:
    pool = KVPool(len(model.llm.model.model.layers), 8, KV_HEADS, HEAD, torch.float16, DEVICE)
    return FusedLM(model, pool, 64)


def attend(qkv: Tensor, pool: LayerPool) -> Tensor:
    return qkv[:, : HEADS * HEAD].tanh().unflatten(1, (HEADS, HEAD))


def test_logits_are_those_of_triton(model, use_up_to):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    last = torch.tensor([2, 0], device=DEVICE)
    use_up_to(0)
    lm = fused(model)
    assert lm._packed is None
    residuals = x.clone(), x.clone()
    expected = lm(residuals[0], attend)
    use_up_to(4)
    lm = fused(model)
    assert lm._packed is not None
    logits = lm(residuals[1], attend)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.01 * expected.abs().max().item())
    torch.testing.assert_close(residuals[1], residuals[0], rtol=0, atol=0.01 * x.abs().max().item())
    assert torch.equal(lm(x.clone(), attend, last), logits[last])


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_or_more_rows_than_measured_take_the_other_path(model, use_up_to, monkeypatch, rows):
    use_up_to(2, first=2)
    lm = fused(model)
    monkeypatch.setattr(type(lm), "_few_packed", lambda *_: pytest.fail(f"{rows} rows"))
    assert lm(torch.randn(rows, 64).half().to(DEVICE), attend).shape == (rows, model.ids.speech_vocab)
