"""The flow of CosyVoice3: against the goldens, in padded batches, at full size, and its backends."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.flow_streams import Stream, Voice

from light_tts.models.checkpoint.cosyvoice3_config import Config3, load_config3
from light_tts.models.flow import estimator_parts
from light_tts.models.flow.chunked import ChunkFlow
from light_tts.models.flow.dit.backend import choose_dit_flow
from light_tts.models.flow.dit.estimator import RotaryEmbedding
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.packed import PackedFlow
from light_tts.models.flow.padded import PaddedFlow
from light_tts.models.flow_options import FlowOptions
from light_tts.tools.parity import Golden

GOLDEN = Golden(Path(__file__).parents[1] / "golden" / "cosyvoice3")
CPU = torch.device("cpu")
BATCH_TOLERANCE = 1e-5  # other shapes, other order of the sums; seen: 3e-6 of values up to 12


@pytest.fixture(scope="module")
def config() -> Config3:
    """With few Euler steps, which takes less time."""
    config = load_config3(GOLDEN.checkpoint)
    return replace(config, flow=replace(config.flow, n_timesteps=3))


@pytest.fixture(scope="module")
def flow(config: Config3) -> DiTFlow:
    return DiTFlow.from_checkpoint(GOLDEN.checkpoint, config, CPU)


def test_sixteen_mixed_items_in_a_batch_equal_single_runs(flow: DiTFlow) -> None:
    items = []
    for seed in range(16):
        stream = Stream(flow, Voice(flow, seed, 9 * (seed % 7)), seed, 5 + 8 * seed)
        items.append(stream.item(5 + 8 * seed, streaming=seed % 4 > 0, finalize=seed % 3 > 0))
    padded = PaddedFlow(flow)
    for item, mel in zip(items, padded(items), strict=True):
        (alone,) = padded([item])
        assert mel.shape == alone.shape
        assert mel.shape[0] == flow.ratio * (len(item.tokens) - (0 if item.finalize else flow.lookahead))
        torch.testing.assert_close(mel, alone, rtol=0, atol=BATCH_TOLERANCE)


@pytest.mark.parametrize("streaming", [False, True])
def test_attention_in_pieces_changes_nothing(
    flow: DiTFlow, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So long items need no memory that grows quadratically: at most so many scores exist at a time."""
    items = [
        Stream(flow, Voice(flow, seed, 30), seed, 60 + seed).item(60 + seed, streaming, True)
        for seed in range(2)
    ]
    whole = PaddedFlow(flow)(items)
    monkeypatch.setitem(estimator_parts.SCORES_AT_ONCE, "cpu", 20_000)  # a few of about 180 queries
    for mel, expected in zip(PaddedFlow(flow)(items), whole, strict=True):
        torch.testing.assert_close(mel, expected, rtol=0, atol=BATCH_TOLERANCE)


def test_only_the_first_head_is_rotated_by_absolute_position() -> None:
    rotary = RotaryEmbedding(4)
    rotary.inv_freq.copy_(torch.tensor([1.0, 0.01]))
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    rotated = rotary(5, 8)(x)
    assert torch.equal(rotated[:, :, 4:], x[:, :, 4:])
    pairs = torch.view_as_complex(x[:, :, :4].unflatten(2, (2, 2)).contiguous())
    angles = torch.tensor([5.0, 6.0, 7.0])[:, None] * rotary.inv_freq
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(3, 2), angles)).flatten(2)
    torch.testing.assert_close(rotated[:, :, :4], expected)


def test_on_a_cpu_streams_are_cached(config: Config3) -> None:
    phases: list[str] = []
    options = FlowOptions(memory=1 << 28, n_timesteps=1)
    backend = choose_dit_flow(GOLDEN.checkpoint, config, CPU, torch.float16, options, phases.append)()
    assert isinstance(backend, ChunkFlow) and phases == ["flow weights"]
    one_step = replace(config, flow=replace(config.flow, n_timesteps=1))
    expected = DiTFlow.from_checkpoint(GOLDEN.checkpoint, one_step, CPU)
    stream = Stream(expected, Voice(expected, 1, 30), 1, 80)
    first, *_ = stream.chunks()
    (mel,), (plain,) = backend([first]), PaddedFlow(expected)([first])
    assert mel.dtype == torch.float32 and stream.memo.content is not None
    torch.testing.assert_close(mel, plain, rtol=0, atol=BATCH_TOLERANCE)


@pytest.fixture
def loaded_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device."""
    load = DiTFlow.from_checkpoint
    monkeypatch.setattr(DiTFlow, "from_checkpoint", lambda folder, config, device: load(folder, config, CPU))


@pytest.mark.usefixtures("loaded_on_cpu")
def test_on_a_gpu_batches_are_packed_with_cached_state(config: Config3) -> None:
    phases: list[str] = []
    options = FlowOptions(gpu_memory=1 << 26)
    new = choose_dit_flow(
        GOLDEN.checkpoint, config, torch.device("cuda"), torch.float16, options, phases.append
    )
    assert isinstance(new(), PackedFlow)
    assert phases == ["flow weights", "imports", "packed weights", "flow memory"]


@pytest.mark.usefixtures("loaded_on_cpu")
@pytest.mark.parametrize(
    ("dtype", "precisions"), [(torch.float32, []), (torch.float16, ["high"]), (torch.bfloat16, ["high"])]
)
def test_without_triton_a_gpu_computes_in_float32_or_tf32(
    config: Config3, dtype: torch.dtype, precisions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    new = choose_dit_flow(GOLDEN.checkpoint, config, torch.device("cuda"), dtype, FlowOptions())
    backend = new()
    assert isinstance(backend, PaddedFlow) and chosen == precisions
    stream = Stream(backend._flow, Voice(backend._flow, 1, 10), 1, 5)
    assert backend([stream.item(5, streaming=False, finalize=True)])[0].dtype == torch.float32


def test_load_trt_says_once_that_it_is_not_supported(
    config: Config3, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        choose_dit_flow(GOLDEN.checkpoint, config, CPU, torch.float32, FlowOptions(load_trt=True))
    assert [record.message for record in caplog.records] == [
        "load_trt: TensorRT is not supported for CosyVoice3; using the built-in flow estimator"
    ]


def test_too_few_tokens_are_refused(flow: DiTFlow) -> None:
    item = Stream(flow, Voice(flow, 3, 10), 3, 3).item(3, streaming=True, finalize=False)
    with pytest.raises(ValueError, match="nothing to speak"):
        PaddedFlow(flow)([item])
