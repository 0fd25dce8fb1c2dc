"""The packed diffusion transformer against the plain one in float32: the error in each type, and numbers that
float16 cannot hold. On a machine without a GPU the references stand in for the kernels (their own tests
compare them), except in one small batch."""

from __future__ import annotations

import copy

import pytest
import torch
from support.flow_families import load_flow
from support.flow_streams import Stream, Voice
from support.packed_on_cpu import kernels_or_references

from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.dit.pack import pack
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.packed import PackedFlow, share
from light_tts.models.flow.padded import PaddedFlow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative error (norm) of the mel spectrogram; seen on a CPU: 9e-8, 8e-5, 6e-4.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


@pytest.fixture(scope="module")
def flow() -> BaseFlow:
    return load_flow("cosyvoice3", DEVICE)


def packed(flow: BaseFlow, dtype: torch.dtype) -> PackedFlow:
    if DEVICE.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    return PackedFlow(copy.deepcopy(flow).to(dtype), *pack(flow, dtype), items=8)


def items(flow: BaseFlow, count: int) -> list[FlowItem]:
    """Return first chunks and whole parts, with and without a prompt."""
    streams = [Stream(flow, Voice(flow, seed, 11 * seed), seed, 5 + 12 * seed) for seed in range(count)]
    return [
        stream.item(len(stream.tokens), streaming=seed % 2 > 0, finalize=seed % 3 > 0)
        for seed, stream in enumerate(streams)
    ]


def error_of(flow: BaseFlow, dtype: torch.dtype, count: int) -> float:
    """Return the largest relative error of a batch's items."""
    batch = items(flow, count)
    pairs = zip(packed(flow, dtype)(batch), PaddedFlow(flow)(batch), strict=True)
    error = max(((mel - expected).norm() / expected.norm()).item() for mel, expected in pairs)
    print(f"{dtype}: {error:.1e}")
    return error


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mel_is_that_of_the_plain_flow(flow: BaseFlow, dtype: torch.dtype) -> None:
    with kernels_or_references(DEVICE):
        assert error_of(flow, dtype, 6) < TOLERANCE[dtype]


def test_the_residual_stream_may_leave_the_range_of_float16(flow: BaseFlow) -> None:
    """The first block adds numbers far beyond 65504, which the norms of the others bring back."""
    large = copy.deepcopy(flow)
    block = large.decoder.estimator.transformer_blocks[0]
    for parameter in (block.attn_norm.linear.weight, block.attn_norm.linear.bias):
        parameter.chunk(6)[5].mul_(1e7)  # the gate of the feed-forward layer
    streams: list[float] = []
    handle = block.register_forward_hook(
        lambda module, arguments, result: streams.append(result.abs().max().item())
    )
    with kernels_or_references(DEVICE):
        error = error_of(large, torch.float16, 2)
    handle.remove()
    assert max(streams) > 10 * torch.finfo(torch.float16).max
    assert error < TOLERANCE[torch.float16]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the other tests run the kernels")
def test_kernels_in_the_interpreter() -> None:
    dtype = torch.float16
    assert error_of(load_flow("cosyvoice3", DEVICE, steps=1), dtype, 1) < TOLERANCE[dtype]


def test_only_what_is_used_is_kept() -> None:
    flow = load_flow("cosyvoice3", DEVICE)
    share(flow, *pack(flow, torch.float16), items=2, room=0)
    assert {name.split(".")[0] for name, _ in flow.named_parameters()} == {"spk_embed_affine_layer"}
    assert {weight.dtype for weight in flow.parameters()} == {torch.float16}
