"""The flow's kernels against plain PyTorch, on packed batches of random lengths. On a machine without a GPU
they run in Triton's interpreter."""

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

from light_tts.kernels.flow.euler_step import flow_step, flow_step_reference
from light_tts.kernels.flow.layer_norm_linear import (
    fold_layer_norm,
    layer_norm_linear,
    layer_norm_linear_reference,
)
from light_tts.kernels.flow.packed_attention import (
    CachedKeys,
    Prefix,
    attention_blocks,
    attention_of_rows,
    attention_of_rows_reference,
    packed_attention,
    packed_attention_reference,
)
from light_tts.kernels.flow.packed_conv import (
    CachedEdges,
    Norm,
    Residual,
    Shift,
    packed_conv,
    packed_conv_reference,
)
from light_tts.kernels.flow.packed_linear import (
    packed_linear,
    packed_linear_add_,
    packed_linear_add_reference_,
    packed_linear_reference,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels_in", "channels_out", "extras"),
    [(80, 32, False), (24, 136, False), (64, 64, True), (24, 48, True), (320, 256, True)],
)
def test_conv_sees_only_its_own_sequence_and_its_past(dtype, channels_in, channels_out, extras):
    torch.manual_seed(0)
    where = positions()
    rows = len(where)
    wide = draw(rows, channels_in + 8, dtype=dtype)  # rows are strided
    wide[where < 0] = torch.nan  # must not be read into others
    weight = draw(3, channels_in, channels_out, dtype=dtype, scale=(3 * channels_in) ** -0.5)
    bias = draw(channels_out, dtype=torch.float32)
    options = {}
    if extras:
        side = draw(rows, 40, dtype=dtype)
        options = {
            "norm": Norm(draw(channels_out), draw(channels_out), 1e-5),
            "shift": Shift(draw(10, channels_out), torch.tensor([7], dtype=torch.int32, device=DEVICE)),
            "residual": Residual(side, draw(40, channels_out, dtype=dtype, scale=0.2), draw(channels_out)),
        }
    x = wide[:, :channels_in]
    found, expected, normal, normal_expected = (poisoned(rows, channels_out, dtype=dtype) for _ in range(4))
    packed_conv(x, weight, bias, where, found, **options, normal=normal if extras else None, eps=1e-5)
    packed_conv_reference(
        x.nan_to_num(), weight, bias, where, expected, **options, normal=normal_expected, eps=1e-5
    )
    assert_close(found, expected, dtype)
    if extras:
        assert_close(normal, normal_expected, dtype)


@pytest.mark.parametrize(
    ("dtype", "activation", "widths"),
    grid(DTYPES, [None, "gelu", "silu"], [(32, 72), (64, 130), (256, 1536), (512, 80)]),
)
def test_norm_linear(dtype, activation, widths):
    torch.manual_seed(1)
    width, out_width = widths
    where = positions()
    x = draw(len(where), width, dtype=dtype) + 1
    gain, offset, weight, bias = draw(width), draw(width), draw(out_width, width), draw(out_width)
    folded, folded_bias = fold_layer_norm(gain, offset, weight * width**-0.5, bias)
    found, expected = (poisoned(len(where), out_width, dtype=dtype) for _ in range(2))
    arguments = folded.to(dtype), folded_bias, where
    layer_norm_linear(x, *arguments, found, 1e-5, activation)
    layer_norm_linear_reference(x, *arguments, expected, 1e-5, activation)
    assert_close(found, expected, dtype)
    packed_linear(x, *arguments, found, activation)
    packed_linear_reference(x, *arguments, expected, activation)
    assert_close(found, expected, dtype)


def test_folded_norm_is_the_norm():
    torch.manual_seed(2)
    x, gain, offset, weight, bias = draw(9, 32), draw(32), draw(32), draw(72, 32), draw(72)
    plain = torch.nn.functional.linear(
        torch.nn.functional.layer_norm(x, (32,), gain, offset, 1e-5), weight, bias
    )
    folded, folded_bias = fold_layer_norm(gain, offset, weight, bias)
    where = torch.arange(9, dtype=torch.int32, device=DEVICE)
    out = layer_norm_linear_reference(x, folded, folded_bias, where, poisoned(9, 72, dtype=x.dtype), 1e-5)
    assert torch.allclose(out, plain, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "widths", "with_norm"), grid(DTYPES, [(24, 32), (128, 40), (1024, 256)], [False, True])
)
def test_linear_add(dtype, widths, with_norm):
    torch.manual_seed(3)
    width, out_width = widths
    where = positions()
    wide = draw(len(where), 2 * out_width, dtype=dtype)
    wide[where < 0] = torch.nan
    y = draw(len(where), width, dtype=dtype)
    weight, bias = draw(width, out_width, dtype=dtype, scale=width**-0.5), draw(out_width)
    other = wide.clone()
    normal, normal_expected = (poisoned(len(where), out_width, dtype=dtype) for _ in range(2))
    packed_linear_add_(wide[:, out_width:], y, weight, bias, where, normal if with_norm else None, 1e-5)
    packed_linear_add_reference_(other[:, out_width:], y, weight, bias, where, normal_expected, 1e-5)
    assert torch.equal(wide[:, :out_width].isnan(), other[:, :out_width].isnan())
    assert_close(wide, other, dtype)
    if with_norm:
        assert_close(normal, normal_expected, dtype)


@pytest.mark.parametrize(("dtype", "block_rows", "head_dim"), grid(DTYPES, [32, 64], [12, 64]))
def test_attention_of_sequences_with_and_without_chunks(dtype, head_dim, block_rows):
    torch.manual_seed(4)
    heads = 2
    where = positions(copies=2)
    qkv = draw(len(where), 3 * heads * head_dim, dtype=dtype)
    qkv[where < 0] = torch.nan
    table = attention_blocks(LENGTHS, (0, 5, 20, 50), block_rows, count=12)
    blocks = torch.from_numpy(table).to(DEVICE)
    found, expected = (poisoned(len(where), heads * head_dim, dtype=dtype) for _ in range(2))
    packed_attention(qkv, blocks, found, heads, block_rows, copies=2)
    packed_attention_reference(qkv, blocks, expected, heads, block_rows, copies=2)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize(("dtype", "block_rows", "head_dim"), grid(DTYPES, [16, 32, 64], [12, 64]))
def test_attention_goes_on_after_pages_and_keeps_pages(dtype, head_dim, block_rows):
    torch.manual_seed(6)
    heads, copies, step = 2, 2, 1
    where = positions(copies=copies)
    qkv = draw(len(where), 3 * heads * head_dim, dtype=dtype)
    qkv[where < 0] = torch.nan
    table = attention_blocks(LENGTHS, (PAGE, PAGE, PAGE, 0), block_rows, 24, PREFIXES)
    blocks = torch.from_numpy(table).to(DEVICE)
    layers = with_new_pages(draw(PAGES, STEPS, 2, copies, PAGE, 2 * heads * head_dim, dtype=dtype))
    pages = torch.tensor(PAGE_TABLE, dtype=torch.int32, device=DEVICE)
    now = torch.tensor([step], dtype=torch.int32, device=DEVICE)
    other_layers = layers.clone()
    found, expected = (poisoned(len(where), heads * head_dim, dtype=dtype) for _ in range(2))
    packed_attention(qkv, blocks, found, heads, block_rows, copies, CachedKeys(layers[:, :, 1], pages, now))
    cached = CachedKeys(other_layers[:, :, 1], pages, now)
    packed_attention_reference(qkv, blocks, expected, heads, block_rows, copies, cached)
    assert_close(found, expected, dtype)
    assert torch.equal(layers.nan_to_num(9), other_layers.nan_to_num(9))
    assert layers[[7, 0, 8, 3]][:, step, 1].isfinite().all()
    assert layers[[7, 0, 8, 3]][:, 0].isnan().all() and layers[1].isnan().all()


@pytest.mark.parametrize("block_rows", [16, 32])
def test_attention_of_a_sequence_does_not_depend_on_the_batch(block_rows):
    """Bit-identical: with the past in pages, alone and after another sequence in other pages."""
    torch.manual_seed(7)
    heads, head_dim, length = 2, 16, 30
    store = draw(PAGES, 1, 1, PAGE, 2 * heads * head_dim)
    own, step = draw(length, 3 * heads * head_dim), torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def attend(lengths: list[int], prefixes: list[Prefix], pages: list[int]) -> torch.Tensor:
        qkv = torch.cat([draw(sum(lengths) - length, own.shape[1]), own])
        table = attention_blocks(lengths, [PAGE] * len(lengths), block_rows, 8, prefixes)
        cached = CachedKeys(store, torch.tensor(pages, dtype=torch.int32, device=DEVICE), step)
        out = poisoned(len(qkv), heads * head_dim, dtype=torch.float32)
        packed_attention(qkv, torch.from_numpy(table).to(DEVICE), out, heads, block_rows, 1, cached)
        return out[-length:]

    alone = attend([length], [Prefix(40, 0, 40)], [5, 2])
    store[[3, 8]] = store[[5, 2]]
    assert torch.equal(attend([50, length], [Prefix(20, 0, 20), Prefix(40, 1, 40)], [1, 3, 8]), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels_in", "channels_out", "shifted"), [(64, 32, False), (24, 136, False), (40, 48, True)]
)
def test_conv_goes_on_after_kept_frames_and_keeps_frames(dtype, channels_in, channels_out, shifted):
    torch.manual_seed(8)
    copies, step = 2, 2
    where = positions(copies=copies)
    rows = len(where) // copies
    wide = draw(len(where), channels_in + 8, dtype=dtype)
    x = wide[:, :channels_in]
    weight = draw(3, channels_in, channels_out, dtype=dtype, scale=(3 * channels_in) ** -0.5)
    bias = draw(channels_out)
    before, keep = (torch.full((rows,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    before[:37], before[37:38] = 2, 6  # the second sequence is one frame
    keep[18:20] = torch.tensor([14, 15], device=DEVICE)
    keep[57:59] = torch.tensor([0, 1], device=DEVICE)
    store = with_new_pages(draw(PAGES, STEPS, copies, 2, channels_in, dtype=dtype))
    other_store = store.clone()
    now = torch.tensor([step], dtype=torch.int32, device=DEVICE)
    shift = Shift(draw(STEPS, channels_out), now) if shifted else None
    found, expected = (poisoned(len(where), channels_out, dtype=dtype) for _ in range(2))
    for conv, out, edges in ((packed_conv, found, store), (packed_conv_reference, expected, other_store)):
        cached = CachedEdges(edges, before.repeat(copies), keep.repeat(copies), now)
        conv(x, weight, bias, where, out, shift=shift, cached=cached)
    assert_close(found, expected, dtype)
    assert torch.equal(store.nan_to_num(9), other_store.nan_to_num(9))
    assert store[[7, 0]][:, step].isfinite().all() and store[[8, 3]].isnan().all()
    for copy in range(copies):
        assert torch.equal(store[7, step, copy], x[copy * rows :][18:20])


def test_more_blocks_than_fit_are_refused():
    with pytest.raises(ValueError, match="3 blocks"):
        attention_blocks([64, 33], [0, 0], 33, count=2)
    with pytest.raises(ValueError, match="97 rows"):
        attention_of_rows([64, 33], [0, 0], count=96)


def test_what_rows_see_in_the_lists_of_their_16_rows():
    table = attention_of_rows([18, 3, 20], [0, 5, 10], 48, [Prefix(20, 7, 40), Prefix(), Prefix(40, 9, 40)])
    first, second, third = [-20, 20, 7, 40], [18, 0, 0, 0], [-19, 40, 9, 40]
    assert table[[0, 15]].tolist() == [[0, 38, 38, 0, *first]] * 2
    assert table[16:18].tolist() == [[0, 38, 38, 18, *first]] * 2
    assert table[18:21].tolist() == [[64, 67, 67, 21, *second]] * 3
    assert table[21].tolist() == [96, 96 + 50, 96 + 60, 0, *third]
    assert table[31].tolist() == [96, 96 + 60, 96 + 60, 0, *third]
    assert table[[32, 40]].tolist() == [[0, 60, 60, 0, *third]] * 2
    assert not table[41:].any()


def test_the_attention_of_rows_is_that_of_blocks():
    torch.manual_seed(9)
    heads, copies, chunks = 2, 2, (PAGE, PAGE, PAGE, 0)
    where = positions(copies=copies)
    rows = len(where) // copies
    qkv = draw(len(where), 3 * heads * 12)
    blocks = torch.from_numpy(attention_blocks(LENGTHS, chunks, 16, 24, PREFIXES)).to(DEVICE)
    table = torch.from_numpy(attention_of_rows(LENGTHS, chunks, rows, PREFIXES)).to(DEVICE)
    stores = [with_new_pages(draw(PAGES, 1, copies, PAGE, 2 * heads * 12))]
    stores.append(stores[0].clone())
    pages = torch.tensor(PAGE_TABLE, dtype=torch.int32, device=DEVICE)
    now = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    found, expected = (poisoned(len(where), heads * 12, dtype=torch.float32) for _ in range(2))
    attention_of_rows_reference(qkv, table, found, heads, copies, CachedKeys(stores[0], pages, now))
    packed_attention_reference(qkv, blocks, expected, heads, 16, copies, CachedKeys(stores[1], pages, now))
    assert_close(found, expected, torch.float32)
    assert torch.equal(stores[0].nan_to_num(9), stores[1].nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_flow_step(dtype):
    torch.manual_seed(5)
    where = positions(copies=2)
    rows, mels, width = len(where) // 2, 80, 32
    h = draw(2 * rows, width, dtype=dtype)
    weight, bias = draw(width, mels, dtype=dtype, scale=width**-0.5), draw(mels)
    dt = torch.rand(10, device=DEVICE)
    step = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    x = draw(rows, mels)
    x[where[:rows] < 0] = torch.nan
    inputs = poisoned(2 * rows, 4 * mels, dtype=dtype)
    other_x, other_inputs = x.clone(), inputs.clone()
    flow_step(h, weight, bias, 0.7, dt, step, where, x, inputs)
    flow_step_reference(h, weight, bias, 0.7, dt, step, where, other_x, other_inputs)
    assert_close(x, other_x, torch.float32 if dtype == torch.float32 else dtype)
    assert_close(inputs, other_inputs, dtype)
