"""The kernels of the flow's diffusion transformer against plain PyTorch, on packed batches of random lengths.
On a machine without a GPU they run in Triton's interpreter."""

import pytest
import torch
from support.flow_rows import (
    DEVICE,
    DTYPES,
    PAGES,
    STEPS,
    assert_close,
    draw,
    poisoned,
    positions,
    with_new_pages,
)
from support.interpreter import GPU, grid

from light_tts.kernels.flow import packed_linear as packed_linear_module
from light_tts.kernels.flow.euler_step import flow_step, flow_step_reference
from light_tts.kernels.flow.grouped_conv import grouped_conv, grouped_conv_reference
from light_tts.kernels.flow.modulated_norm import modulated_norm, modulated_norm_reference
from light_tts.kernels.flow.packed_attention import (
    attention_blocks,
    packed_attention,
    packed_attention_reference,
)
from light_tts.kernels.flow.packed_conv import CachedEdges
from light_tts.kernels.flow.packed_linear import (
    Gate,
    Rotary,
    packed_linear,
    packed_linear_add_,
    packed_linear_add_reference_,
    packed_linear_reference,
    rotary_table,
)
from light_tts.models.flow.dit.estimator import RotaryEmbedding

COPIES = 2
WIDTH = 1024 if GPU else 128  # of the model; the interpreter is slow
LARGEST = torch.finfo(torch.float16).max


def step_on_device(step: int) -> torch.Tensor:
    return torch.tensor([step], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("dtype", "width"), grid(DTYPES, [40, WIDTH]))
def test_norm_with_shift_and_scale_of_the_step(dtype, width):
    torch.manual_seed(0)
    where = positions((19, 1, 12), 8, copies=COPIES)
    x = draw(len(where), width, scale=3.0) + 1
    x[where < 0] = torch.nan
    modulation = draw(STEPS, 5, 2, width)[:, 3]  # of all blocks of a step; strided
    found, expected = (poisoned(len(where), width, dtype=dtype) for _ in range(2))
    for norm, out in ((modulated_norm, found), (modulated_norm_reference, expected)):
        norm(x, modulation, step_on_device(2), where, out, 1e-6)
    assert_close(found, expected, dtype)


def test_what_float16_cannot_hold_saturates_and_nan_remains():
    where = torch.arange(4, dtype=torch.int32, device=DEVICE)
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0], device=DEVICE)[:, None]
    x, bias = sign * torch.linspace(-1, 1, 16, device=DEVICE), torch.zeros(16, device=DEVICE)
    x[3] = torch.nan
    modulation = torch.stack([bias, bias + 1e5])[None]
    normal = modulated_norm(x, modulation, step_on_device(0), where, poisoned(4, 16, dtype=torch.float16), 0)
    single = torch.full((1, 1, 16, 16), 1e4, device=DEVICE), bias, where
    outs = [
        normal,
        packed_linear(x.half() * 10, single[0][0, 0].half(), *single[1:], torch.empty_like(normal)),
        grouped_conv(x * 1e6, single[0].half(), *single[1:], torch.empty_like(normal)),
    ]
    for out in outs:
        assert out[:3].isfinite().all() and out[3].isnan().all()
    assert (normal[:3, 0] == -LARGEST * sign[:3, 0]).all() and (normal[:3, 15] == LARGEST * sign[:3, 0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_with_tanh(dtype):
    torch.manual_seed(1)
    where = positions()
    x, weight = draw(len(where), 64, dtype=dtype), draw(64, 130, dtype=dtype, scale=0.5)
    found, expected = (poisoned(len(where), 130, dtype=dtype) for _ in range(2))
    for linear, out in ((packed_linear, found), (packed_linear_reference, expected)):
        linear(x, weight, draw(130) * 0, where, out, "gelu_tanh")
    assert_close(found, expected, dtype)
    exact = packed_linear_reference(x, weight, draw(130) * 0, where, torch.empty_like(expected), "gelu")
    assert not torch.equal(exact[where >= 0], expected[where >= 0])


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    grid(
        DTYPES,
        [  # in, out, first column of the queries and of the keys, rotated columns
            (32, 192, (0, 64), 16),  # several in a block
            (64, 480, (16, 176), 32),  # beginning within blocks
            (64, 272, (96, 240), 64),  # across blocks, and less than the last rotation in the end
            *[(WIDTH, WIDTH, (0, 512), 64)] * GPU,
        ],
    ),
)
def test_first_heads_of_queries_and_keys_are_rotated(dtype, sizes):
    torch.manual_seed(2)
    width, out_width, starts, dim = sizes
    dim = min(dim, out_width - starts[1])
    where = positions((37, 1, 40), 8, copies=COPIES)
    rows = len(where) // COPIES
    frame = where[:rows] + torch.randint(400, (rows,), device=DEVICE).int() * (where[:rows] >= 0)
    rotation = Rotary(
        frame, rotary_table(10000.0 ** -torch.linspace(0, 1, dim // 2), 500).to(DEVICE), starts, dim
    )
    x, bias = draw(len(where), width, dtype=dtype), draw(out_width)
    weight = draw(width, out_width, dtype=dtype, scale=width**-0.5)
    found, expected, plain = (poisoned(len(where), out_width, dtype=dtype) for _ in range(3))
    packed_linear(x, weight, bias, where, found, rotation=rotation)
    packed_linear_reference(x, weight, bias, where, expected, rotation=rotation)
    assert_close(found, expected, dtype)
    packed_linear(x, weight, bias, where, plain)
    for start in starts:
        plain[:, start : start + dim] = found[:, start : start + dim]
    assert torch.equal(found.nan_to_num(), plain.nan_to_num())


def test_the_table_rotates_as_the_estimator():
    torch.manual_seed(3)
    width, frames = 32, 50
    embedding = RotaryEmbedding(16)
    embedding.inv_freq.copy_(10000.0 ** -(torch.arange(0, 16, 2) / 16))
    x = torch.randn(1, frames, width)
    rotation = Rotary(torch.arange(frames).int() + 7, rotary_table(embedding.inv_freq, 60), (0, 16), 16)
    found = packed_linear_reference(
        x[0], torch.eye(width), torch.zeros(width), rotation.frame, torch.empty(frames, width), None, rotation
    )
    rotate = embedding(7, 57)
    expected = torch.cat([rotate(x[..., :16]), rotate(x[..., 16:])], dim=2)
    assert torch.allclose(found, expected[0], atol=1e-6)


@pytest.mark.parametrize(("dtype", "widths"), grid(DTYPES, [(24, 32), (2 * WIDTH, WIDTH)]))
def test_gated_sum_in_float32(dtype, widths):
    torch.manual_seed(4)
    width, out_width = widths
    where = positions((37, 1, 40), 8, copies=COPIES)
    x = draw(len(where), out_width)
    x[where < 0] = torch.nan
    y, bias = draw(len(where), width, dtype=dtype), draw(out_width)
    weight = draw(width, out_width, dtype=dtype, scale=width**-0.5)
    gate = Gate(draw(STEPS, 6, out_width)[:, 2], step_on_device(1))
    other = x.clone()
    packed_linear_add_(x, y, weight, bias, where, gate=gate)
    packed_linear_add_reference_(other, y, weight, bias, where, gate=gate)
    assert_close(x, other, torch.float32)


CONV = [  # taps, groups, in and out of a group
    (31, 2, 4, 4),
    (31, 2, 24, 40),
    (31, 1, 64, 64),
    (3, 4, 8, 8),
]


@pytest.mark.parametrize(
    ("dtype", "inputs", "sizes", "summed"), grid(DTYPES, ["float32", "weight"], CONV, [False, True])
)
def test_grouped_conv_sees_only_its_own_sequence_and_its_past(dtype, inputs, sizes, summed):
    torch.manual_seed(5)
    taps, groups, width, out_width = sizes
    where = positions()
    x = draw(len(where), groups * width, dtype=torch.float32 if inputs == "float32" else dtype)
    x[where < 0] = torch.nan  # must not be read into others
    weight = draw(*sizes, dtype=dtype, scale=(taps * width) ** -0.5)
    bias = draw(groups * out_width)
    residual = draw(len(where), groups * out_width) if summed else None
    out_dtype = torch.float32 if summed else dtype
    found, expected = (poisoned(len(where), groups * out_width, dtype=out_dtype) for _ in range(2))
    if residual is not None:
        found[where >= 0] = residual[where >= 0]
    grouped_conv(x, weight, bias, where, found, found if summed else None)
    grouped_conv_reference(x.nan_to_num(), weight, bias, where, expected, residual)
    assert_close(found, expected, out_dtype)


def test_grouped_conv_is_that_of_pytorch():
    torch.manual_seed(6)
    conv = torch.nn.Conv1d(24, 24, 31, groups=3)
    x, where = torch.randn(40, 24), torch.arange(40).int()
    weight = conv.weight.unflatten(0, (3, 8)).permute(3, 0, 2, 1).contiguous()
    found = grouped_conv_reference(x, weight, conv.bias, where, torch.empty(40, 24))
    expected = torch.nn.functional.mish(conv(torch.nn.functional.pad(x.T, (30, 0))[None]))[0].T
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("dtype", "inputs", "sizes"), grid(DTYPES, ["float32", "weight"], CONV[:3]))
def test_grouped_conv_goes_on_after_kept_frames_and_keeps_frames(dtype, inputs, sizes):
    """Pages of 35 frames, of which the last 30 are kept: of the first sequence, which continues, one page; of
    the third one, which begins, one; the second one is one frame after a page."""
    torch.manual_seed(7)
    taps, groups, width, out_width = sizes
    edge, step = taps - 1, 2
    where = positions(copies=COPIES)
    rows = len(where) // COPIES
    x = draw(len(where), groups * width, dtype=torch.float32 if inputs == "float32" else dtype)
    x[where < 0] = torch.nan
    weight = draw(*sizes, dtype=dtype, scale=(taps * width) ** -0.5)
    bias = draw(groups * out_width)
    before, keep = (torch.full((rows,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    before[:37], before[37:38] = 2, 6
    keep[5:35] = 7 * edge + torch.arange(edge)
    keep[43:73] = torch.arange(edge)
    store = with_new_pages(draw(PAGES, STEPS, COPIES, edge, groups * width, dtype=dtype))
    other_store = store.clone()
    found, expected = (poisoned(len(where), groups * out_width, dtype=dtype) for _ in range(2))
    for conv, out, edges in ((grouped_conv, found, store), (grouped_conv_reference, expected, other_store)):
        cached = CachedEdges(edges, before.repeat(COPIES), keep.repeat(COPIES), step_on_device(step))
        conv(x if conv is grouped_conv else x.nan_to_num(), weight, bias, where, out, cached=cached)
    assert_close(found, expected, dtype)
    assert torch.equal(store.nan_to_num(9), other_store.nan_to_num(9))
    assert store[[7, 0]][:, step].isfinite().all() and store[[8, 3]].isnan().all()
    for copy in range(COPIES):
        assert torch.equal(store[7, step, copy], x[copy * rows :][5:35].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_conv_in_pages_is_that_of_the_whole(dtype):
    torch.manual_seed(8)
    taps, groups, width, page = 31, 2, 16, 50
    x = draw(2 * page + 20, groups * width, dtype=dtype)
    weight, bias = draw(taps, groups, width, width, dtype=dtype, scale=0.05), draw(groups * width)
    where = torch.arange(len(x), dtype=torch.int32, device=DEVICE)
    whole = grouped_conv(x, weight, bias, where, torch.empty_like(x))
    store, step = poisoned(3, 1, 1, taps - 1, groups * width, dtype=dtype), step_on_device(0)
    parts = []
    for start, before, frames in ((0, -1, page), (page, 2, page), (2 * page, 0, 20)):
        part, position = x[start : start + frames], where[:frames]
        kept = (2 if start == 0 else 0) * (taps - 1) + position - (page - taps + 1)
        keep = torch.where(position >= page - taps + 1, kept, -1).int()
        cached = CachedEdges(store, torch.full_like(position, before), keep, step)
        parts.append(grouped_conv(part, weight, bias, position, torch.empty_like(part), cached=cached))
    assert_close(torch.cat(parts), whole, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_and_attention_with_heads_of_64(dtype):
    torch.manual_seed(9)
    heads, width, mels = WIDTH // 64, WIDTH, 80
    where = positions((37, 3), 8, copies=COPIES)
    rows = len(where) // COPIES
    qkv = draw(len(where), 3 * width, dtype=dtype)
    blocks = torch.from_numpy(attention_blocks((37, 3), (0, 2), 32, count=4)).to(DEVICE)
    found, expected = (poisoned(len(where), width, dtype=dtype) for _ in range(2))
    packed_attention(qkv, blocks, found, heads, 32, COPIES)
    packed_attention_reference(qkv, blocks, expected, heads, 32, COPIES)
    assert_close(found, expected, dtype)
    weight, bias, dt = (
        draw(width, mels, dtype=dtype, scale=width**-0.5),
        draw(mels),
        torch.rand(STEPS).to(DEVICE),
    )
    states = [draw(rows, mels)]
    states.append(states[0].clone())
    inputs = [poisoned(len(where), 4 * mels, dtype=dtype) for _ in range(2)]
    for step, x, own in zip((flow_step, flow_step_reference), states, inputs, strict=True):
        step(qkv[:, :width].contiguous(), weight, bias, 0.7, dt, step_on_device(1), where, x, own)
    assert_close(*states, torch.float32 if dtype == torch.float32 else dtype)
    assert_close(*inputs, dtype)


@pytest.mark.parametrize(
    ("rows", "out_width", "tile"),
    [(200, 3072, (64, 128)), (200, 2048, (64, 64)), (200, 1024, (64, 32)), (8192, 3072, (128, 128))],
)
def test_wide_products_have_the_largest_tiles_that_occupy_a_gpu(rows, out_width, tile):
    config = packed_linear_module._wide_config(torch.empty(rows, 1024).half(), rows, out_width)
    assert config is not None and (config["BLOCK_ROWS"], config["BLOCK_OUT"]) == tile
    assert packed_linear_module._wide_config(torch.empty(rows, 512).half(), rows, out_width) is None
