"""The encoder of the packed flow against the plain one. On a machine without a GPU the references stand in
for the kernels (test_encoder_kernels.py compares them), except in one small batch."""

import numpy as np
import pytest
import torch
from support.flow_families import FAMILIES, ONLY_UNET, load_flow, pack
from support.packed_on_cpu import kernels_or_references

from light_tts.models.flow import packed_encoder
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.encoder_table import EncoderItem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 5e-6  # relative error (norm) in float32
CHUNK, LOOKAHEAD, RATIO, VOCABULARY, MELS = 25, 3, 2, 729, 80
ENDS = (CHUNK, CHUNK + 1, CHUNK + LOOKAHEAD, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + LOOKAHEAD, 1, 64)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def flow(family: str) -> BaseFlow:
    return load_flow(family, DEVICE)


def batch(count: int, seed: int = 0) -> list[tuple[EncoderItem, bool]]:
    """Return items and whether each is final."""
    random = np.random.default_rng(seed)
    items = []
    for index in range(count):
        ids = random.integers(0, VOCABULARY, ENDS[(index + seed) % len(ENDS)])
        finalize = bool(index // 2 % 2) or len(ids) <= LOOKAHEAD
        spoken = len(ids) if finalize else len(ids) - LOOKAHEAD
        start = 0 if index % 3 else RATIO * (spoken // CHUNK * CHUNK) % (RATIO * spoken)
        items.append((EncoderItem(ids, spoken, bool(index % 2), start), finalize))
    return items


def error_of(
    flow: BaseFlow, items: list[tuple[EncoderItem, bool]], dtype: torch.dtype = torch.float32, width: int = 64
) -> float:
    """Return the relative error of the features of all items in one batch, each against the plain encoder
    alone in float32. Rows that belong to none must stay as they are."""
    (_, encoder), first = pack(flow, dtype), 5
    expected = []
    for item, finalize in items:
        ids, length = torch.from_numpy(item.ids)[None].to(DEVICE), torch.tensor([len(item.ids)]).to(DEVICE)
        features, _ = flow.condition(ids, length, item.streaming, finalize)
        expected.append(features[0, item.start :])
    wanted = torch.cat(expected)
    height = len(items) + len(items) // 8  # some are not used
    table = encoder.table([item for item, _ in items], first, height, width)
    out = torch.full((first + len(wanted) + 7, 3 * MELS), torch.nan, dtype=dtype, device=DEVICE)
    parts = encoder.parts(torch.from_numpy(table).to(DEVICE), height, width)
    encoder(parts, out[:, MELS : 2 * MELS])
    found = out[first : first + len(wanted), MELS : 2 * MELS]
    assert out.isnan().sum() == out.numel() - found.numel()
    error = ((found.float() - wanted).norm() / wanted.norm()).item()
    print(f"{len(items)} items, {dtype}: {error:.1e}")
    return error


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("count", "seed"), [(1, 0), (1, 3), (1, 7), (16, 0), (16, 5)])
def test_features_are_those_of_the_plain_encoder(flow, count, seed, few, monkeypatch):
    monkeypatch.setattr(packed_encoder, "FEW_ROWS", 10**6 if few else 0)
    with kernels_or_references(DEVICE), torch.inference_mode():
        assert error_of(flow, batch(count, seed)) < TOLERANCE


@ONLY_UNET
def test_positions_of_long_items_are_computed_each_time(flow, monkeypatch):
    monkeypatch.setattr(packed_encoder, "KEPT_TOKENS", 32)
    with kernels_or_references(DEVICE), torch.inference_mode():
        assert error_of(flow, batch(6)) < TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_half_precision(flow, dtype, tolerance):
    with kernels_or_references(DEVICE), torch.inference_mode():
        assert error_of(flow, batch(8), dtype) < tolerance


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the other tests run the kernels")
def test_kernels_in_the_interpreter(flow, monkeypatch):
    monkeypatch.setattr(packed_encoder, "FEW_ROWS", 32)  # tokens have few, frames many
    with torch.inference_mode():
        assert error_of(flow, batch(1, seed=1), width=32) < TOLERANCE
