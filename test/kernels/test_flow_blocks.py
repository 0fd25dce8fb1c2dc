"""The kernels of a transformer block in three launches against plain PyTorch, on packed batches of random
lengths. On a machine without a GPU they run in Triton's interpreter."""

import json
from pathlib import Path

import pytest
import torch
from support.flow_rows import (
    DEVICE,
    DTYPES,
    LENGTHS,
    PAGE,
    PAGE_TABLE,
    PAGES,
    PREFIXES,
    STEPS,
    assert_close,
    draw,
    poisoned,
    positions,
    with_new_pages,
)
from support.interpreter import grid

from light_tts.kernels import configs
from light_tts.kernels.flow import packed_attention, packed_block, packed_linear
from light_tts.kernels.flow.packed_attention import (
    CachedKeys,
    attend_project,
    attend_project_reference,
    attention_blocks,
)
from light_tts.kernels.flow.packed_block import FeedBuffers, feed_forward, feed_forward_reference
from light_tts.kernels.launch import measured_up_to
from light_tts.models.flow.unet.estimator import EstimatorMasks, TransformerBlock
from light_tts.models.flow.unet.packed import Transformer
from light_tts.models.flow.unet.rows import Buffers, Fused, PackedRun, Rows

COPIES, WIDTH = 2, 40


def inputs(heads: int, head_dim: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """-> queries, keys and values; weight of the output projection"""
    inner = heads * head_dim
    return draw(rows, 3 * inner, dtype=dtype), draw(inner, WIDTH, dtype=dtype, scale=head_dim**-0.5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_rows", "early"), grid(DTYPES, [12, 64], [16, 32, 64], [0, 1])
)
def test_attention_with_the_output_projection(dtype, head_dim, block_rows, early, monkeypatch):
    torch.manual_seed(0)
    config = {"BLOCK_KEYS": 64, "EARLY": early, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(packed_attention, "measured_for_rows", lambda *_: dict(config))
    heads = 2
    where = positions(copies=COPIES)
    qkv, weight = inputs(heads, head_dim, len(where), dtype)
    qkv[where < 0] = torch.nan  # must not be read into others
    table = attention_blocks(LENGTHS, (0, 5, 20, 50), block_rows, count=20)
    blocks = torch.from_numpy(table).to(DEVICE)
    found, expected = (poisoned(heads, len(where), WIDTH, dtype=dtype) for _ in range(2))
    attend_project(qkv, blocks, weight, found, block_rows, COPIES)
    attend_project_reference(qkv, blocks, weight, expected, block_rows, COPIES)
    assert_close(found, expected, dtype)
    assert torch.equal(found[0].isnan().all(1), where < 0)


@pytest.mark.parametrize(("dtype", "head_dim"), grid(DTYPES, [12, 64]))
def test_attention_with_the_output_projection_goes_on_after_pages_and_keeps_pages(dtype, head_dim):
    torch.manual_seed(1)
    heads, block_rows, step = 2, 32, 1
    where = positions(copies=COPIES)
    qkv, weight = inputs(heads, head_dim, len(where), dtype)
    table = attention_blocks(LENGTHS, (PAGE, PAGE, PAGE, 0), block_rows, 24, PREFIXES)
    blocks = torch.from_numpy(table).to(DEVICE)
    layers = with_new_pages(draw(PAGES, STEPS, 2, COPIES, PAGE, 2 * heads * head_dim, dtype=dtype))
    other_layers = layers.clone()
    pages = torch.tensor(PAGE_TABLE, dtype=torch.int32, device=DEVICE)
    now = torch.tensor([step], dtype=torch.int32, device=DEVICE)
    found, expected = (poisoned(heads, len(where), WIDTH, dtype=dtype) for _ in range(2))
    for attend, out, store in (
        (attend_project, found, layers),
        (attend_project_reference, expected, other_layers),
    ):
        cached = CachedKeys(store[:, :, 1], pages, now)
        attend(qkv, blocks, weight, out, block_rows, COPIES, cached)
    assert_close(found, expected, dtype)
    assert_close(layers, other_layers, dtype)


@pytest.mark.parametrize(
    ("dtype", "widths", "splits", "early", "block_rows"),
    [
        (dtype, widths, splits, early, block_rows)
        for dtype, widths, (splits, early), block_rows in grid(
            DTYPES, [(24, 40), (64, 256)], [(1, 0), (2, 0), (8, 0), (16, 0), (16, 1)], [16, 32]
        )
    ],
)
def test_feed_forward(dtype, widths, splits, early, block_rows, monkeypatch):
    torch.manual_seed(2)
    width, feed = widths
    config = {
        "BLOCK_ROWS": block_rows,
        "BLOCK_FEED": 16,
        "SPLITS": splits,
        "EARLY": early,
        "num_warps": 4,
        "num_stages": 2,
    }
    monkeypatch.setattr(packed_block, "measured_for_rows", lambda *_: dict(config))
    where = positions()
    rows, heads = len(where), 3
    projected, out_bias = draw(heads, rows, width, dtype=dtype), draw(width)
    projected[:, where < 0] = torch.nan
    up = draw(width, feed, dtype=dtype, scale=width**-0.5), draw(feed)
    down = draw(feed, width, dtype=dtype, scale=feed**-0.5), draw(width)
    buffers = FeedBuffers.of(rows, width, DEVICE)
    buffers.sums.fill_(torch.nan)
    wide = draw(rows, 2 * width, dtype=dtype)  # rows are strided
    wide[where < 0] = torch.nan
    for _ in range(2):  # the counters are ready for the next call
        other = wide.clone()
        normal, other_normal = (poisoned(rows, width, dtype=dtype) for _ in range(2))
        for run, x, out in (
            (feed_forward, wide, normal),
            (feed_forward_reference, other, other_normal),
        ):
            run(x[:, width:], projected, out_bias, up, down, where, buffers, out, 1e-5)
        assert_close(wide, other, dtype)
        assert_close(normal, other_normal, dtype)
        wide = other
    assert not buffers.counters.any()


@pytest.mark.parametrize("measured", [128, 256, 512])
def test_block_of_full_width_is_the_plain_one(measured, monkeypatch):
    """Two blocks, one after the other, at the sizes of CosyVoice2-0.5B in float16, with the weights in
    float32 for the plain ones, in the launch configurations shipped for so many rows of an H200."""
    torch.manual_seed(3)
    width, heads, head_dim, chunk, queries = 256, 8, 64, 20, 16
    shipped = json.loads((Path(configs.__file__).parent / "NVIDIA_H200.json").read_text())
    for module in (packed_attention, packed_block, packed_linear):
        monkeypatch.setattr(
            module, "measured_for_rows", lambda kernel, *_: measured_up_to(shipped[kernel], rows=measured)
        )
    modules = [TransformerBlock(width, heads, head_dim).to(DEVICE).requires_grad_(False) for _ in range(2)]
    lengths, size = (30, 41), 96
    buffers = Buffers(
        x=torch.zeros(size, 80, device=DEVICE),
        inputs=draw(COPIES * size, 320, dtype=torch.float16),
        hidden=(draw(COPIES * size, width, dtype=torch.float16),) * 3,
        joined=draw(COPIES * size, 2 * width, dtype=torch.float16),
        qkv=poisoned(COPIES * size, 3 * heads * head_dim, dtype=torch.float16),
        attended=poisoned(COPIES * size, heads * head_dim, dtype=torch.float16),
        feed=poisoned(COPIES * size, 4 * width, dtype=torch.float16),
        normal=poisoned(COPIES * size, width, dtype=torch.float16),
        fused=Fused(
            poisoned(heads * COPIES * size * width, dtype=torch.float16),
            FeedBuffers.of(COPIES * size, width, DEVICE),
            heads,
        ),
    ).first(size, few=True, fused=True)
    rows = Rows(buffers, 8, queries)
    table = rows.empty()
    parts = rows.parts(table)
    position = torch.cat([torch.arange(length) for length in lengths]).numpy()
    parts.position.reshape(COPIES, size)[:, : sum(lengths)] = position
    parts.blocks[:] = attention_blocks(lengths, (chunk, 0), queries, 8)
    rows.table.copy_(torch.from_numpy(table))
    x = buffers.joined[:, width:]
    before = x.float()
    expected = before.clone()
    inside = rows.position >= 0
    normal = torch.nn.functional.layer_norm(x.float(), (width,), eps=1e-5)
    buffers.normal[inside] = normal[inside].to(torch.float16)
    run = PackedRun(rows)
    for module in modules:
        Transformer.of(module, torch.float16)(run, x)
        for copy in range(COPIES):
            start = copy * size
            for length, seen in zip(lengths, (chunk, None), strict=True):
                own = expected[None, start : start + length]
                masks = EstimatorMasks.build(
                    torch.tensor([length], device=DEVICE), length, seen, torch.float32
                )
                expected[start : start + length] = module(own, masks.attention)
                start += length
    change = (expected - before)[inside]
    error = ((x.float() - expected)[inside].norm() / change.norm()).item()
    print(f"relative to the change: {error:.1e}")
    assert error < 4e-3
    assert torch.equal(x[~inside].float(), expected[~inside])
