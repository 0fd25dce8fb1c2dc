"""The flow: padded batches, attention in chunks, the exported estimator, refusals."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from light_tts.models.checkpoint.cosyvoice2_config import Config, load_config
from light_tts.models.flow.estimator_backend import choose_estimator
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.masks import EstimatorMasks

CHECKPOINT = Path(__file__).parents[1] / "golden" / "cosyvoice2" / "checkpoint"
BATCH_TOLERANCE = 1e-5  # other shapes, other order of the sums; seen: 2e-6 of values up to 10


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(CHECKPOINT)


@pytest.fixture(scope="module")
def flow(config: Config) -> Flow:
    return Flow.from_checkpoint(CHECKPOINT, config, torch.device("cpu"))


def random_item(config: Config, tokens: int, prompt: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flow = config.flow
    return {
        "token": torch.randint(flow.vocab_size, (tokens,), generator=generator),
        "prompt_token": torch.randint(flow.vocab_size, (prompt,), generator=generator),
        "prompt_feat": torch.randn(flow.token_mel_ratio * prompt, flow.output_size, generator=generator),
        "embedding": torch.randn(flow.spk_embed_dim, generator=generator),
    }


def speak(
    flow: Flow, items: list[dict[str, torch.Tensor]], streaming: bool, finalize: list[bool]
) -> list[torch.Tensor]:
    """The mel (80, frames) of each item, all in one batch whose padding is not zero."""

    def pad(name: str, value: float) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([item[name] for item in items], True, value)

    mel, lengths = flow.inference(
        token=pad("token", 7),
        token_len=torch.tensor([len(item["token"]) for item in items]),
        prompt_token=pad("prompt_token", 5),
        prompt_len=torch.tensor([len(item["prompt_token"]) for item in items]),
        prompt_feat=pad("prompt_feat", 3.0),
        embedding=torch.stack([item["embedding"] for item in items]),
        streaming=streaming,
        finalize=torch.tensor(finalize),
    )
    for row, length in zip(mel, lengths, strict=True):
        assert not row[:, length:].any()
    return [row[:, :length] for row, length in zip(mel, lengths, strict=True)]


@pytest.mark.parametrize("streaming", [False, True])
def test_padded_batch_equals_single_runs(flow: Flow, config: Config, streaming: bool) -> None:
    sizes = [(57, 33), (4, 0), (80, 12), (28, 61), (1, 98)]
    finalize = [True, False, False, True, True]
    items = [random_item(config, *size, seed) for seed, size in enumerate(sizes)]
    batched = speak(flow, items, streaming, finalize)
    for item, final, mel, (tokens, _) in zip(items, finalize, batched, sizes, strict=True):
        (single,) = speak(flow, [item], streaming, [final])
        frames = config.token_mel_ratio * (tokens if final else tokens - config.flow.pre_lookahead_len)
        assert mel.shape == single.shape == (config.flow.output_size, frames)
        torch.testing.assert_close(mel, single, rtol=0, atol=BATCH_TOLERANCE)


def test_streamed_chunks_do_not_change_when_more_tokens_arrive(flow: Flow, config: Config) -> None:
    chunk, lookahead = config.chunk_size, config.flow.pre_lookahead_len
    item = random_item(config, tokens=3 * chunk + lookahead, prompt=chunk, seed=1)
    first = {**item, "token": item["token"][: chunk + lookahead]}
    (early,) = speak(flow, [first], True, [False])
    (late,) = speak(flow, [item], True, [False])
    torch.testing.assert_close(late[:, : early.shape[1]], early, rtol=0, atol=BATCH_TOLERANCE)


def test_same_inputs_give_the_same_bits(flow: Flow, config: Config) -> None:
    item = random_item(config, tokens=30, prompt=20, seed=2)
    first, second = (speak(flow, [item], True, [True])[0] for _ in range(2))
    assert torch.equal(first, second)


def test_too_few_tokens_are_refused(flow: Flow, config: Config) -> None:
    item = random_item(config, tokens=config.flow.pre_lookahead_len, prompt=10, seed=3)
    with pytest.raises(ValueError, match="nothing to speak"):
        speak(flow, [item], True, [False])


def test_estimator_equals_the_exported_graph(flow: Flow, config: Config) -> None:
    """The ONNX file beside the checkpoint holds the estimator with full attention."""
    generator = torch.Generator().manual_seed(4)
    frames, channels = 91, config.flow.output_size
    x, mu, cond = torch.randn(3, 2, channels, frames, generator=generator)
    spks, t = torch.randn(2, channels, generator=generator), torch.tensor([0.3, 0.3])
    masks = EstimatorMasks.build(torch.tensor([frames, frames]), frames, None, torch.float32)
    backend = choose_estimator(flow.decoder.estimator, load_trt=False, device=torch.device("cpu"))
    ours = backend(x, masks, mu, t, spks, cond)

    session = onnxruntime.InferenceSession(
        CHECKPOINT / "flow.decoder.estimator.fp32.onnx", providers=["CPUExecutionProvider"]
    )
    inputs = [x, masks.frames, mu, t, spks, cond]
    feeds = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), inputs, strict=True)}
    (theirs,) = session.run(None, feeds)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-4)


def test_load_trt_without_cuda_says_so_once(flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choose_estimator(flow.decoder.estimator, load_trt=True, device=torch.device("cpu"))
    assert [record.message for record in caplog.records] == [
        "load_trt: this process has no CUDA device; using the built-in flow estimator"
    ]


def extra_memory(tokens: int, streaming: bool) -> float:
    """MiB that the flow needs to speak so many tokens, in a process of its own."""
    command = [sys.executable, Path(__file__).parents[1] / "flow_memory.py", str(tokens), str(int(streaming))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("streaming", [False, True])
def test_memory_grows_linearly_with_the_tokens(streaming):
    """With one score for each pair of frames 1000 tokens would take 350 MiB."""
    assert extra_memory(1000, streaming) < 100
