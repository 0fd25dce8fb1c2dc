"""The kernels of the flow's encoder, and the one that fills the rows of a batch, against plain PyTorch. On a
machine without a GPU they run in Triton's interpreter."""

import pytest
import torch
from support.flow_rows import DEVICE, DTYPES, assert_close, draw, poisoned, positions
from support.interpreter import grid

from light_tts.kernels.flow.fill_rows import fill_rows, fill_rows_reference
from light_tts.kernels.flow.layer_norm_linear import layer_norm_linear, layer_norm_linear_reference
from light_tts.kernels.flow.relative_attention import relative_attention, relative_attention_reference
from light_tts.kernels.flow.repeat_rows import repeat_rows, repeat_rows_reference
from light_tts.kernels.flow.row_norm import row_norm, row_norm_reference
from light_tts.kernels.flow.shifted_linear import shifted_linear, shifted_linear_reference

SIZE = 96  # of a padded item


def padded(lengths: list[int]) -> torch.Tensor:
    """Return the position of each row of items of SIZE rows, -1 from their length on."""
    place = torch.arange(SIZE).expand(len(lengths), -1)
    place = torch.where(place < torch.tensor(lengths)[:, None], place, -1)
    return place.flatten().to(DEVICE, torch.int32)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "known"), grid(DTYPES, [12, 64], [SIZE, 130])
)  # known: projected positions
def test_relative_attention(dtype, head_dim, known):
    torch.manual_seed(0)
    heads, lengths, chunks = 2, [96, 50, 1, 51, 0], [25, 25, 25, 0, 0]
    where, inner = padded(lengths), heads * head_dim
    qkv, biases = draw(len(where), 3 * inner, dtype=dtype), draw(2, inner)
    qkv[where < 0] = torch.nan
    table = draw(2 * known - 1, inner, dtype=dtype)
    items = torch.tensor([lengths, chunks, lengths], dtype=torch.int32, device=DEVICE).T.contiguous()[:, :2]
    found, expected = (poisoned(len(where), inner, dtype=dtype) for _ in range(2))
    relative_attention(qkv, table, biases, items, found, heads)
    relative_attention_reference(qkv, table, biases, items, expected, heads)
    assert found[where >= 0].isfinite().all()
    assert_close(found, expected, dtype)


@pytest.mark.parametrize(
    ("dtype", "widths", "first", "then"),
    grid(DTYPES, [(24, 40), (32, 72)], [0, -2], [None, "leaky_relu", "add"]),
)
def test_shifted_linear_sees_only_its_own_item(dtype, widths, first, then):
    torch.manual_seed(1)
    width, out_width = widths
    taps, where = 3 - first // 2, padded([96, 40, 1, 0])
    x = draw(len(where), width, dtype=dtype)
    weight = draw(taps, width, out_width, dtype=dtype, scale=(taps * width) ** -0.5)
    bias = draw(out_width)
    then = draw(len(where), out_width, dtype=dtype) if then == "add" else then
    found, expected = (poisoned(len(where), out_width, dtype=dtype) for _ in range(2))
    shifted_linear(x, weight, bias, where, found, SIZE, first, then)
    shifted_linear_reference(x, weight, bias, where, expected, SIZE, first, then)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [9, 513])
def test_row_norm(dtype, rows):
    torch.manual_seed(2)
    x, affine = draw(rows, 72, dtype=dtype) + 1, (draw(72), draw(72))
    where = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    where[2:9] = torch.arange(7, device=DEVICE)
    x[where < 0] = torch.nan
    for options in ((), (affine,)):
        found, expected = (poisoned(rows, 72, dtype=dtype) for _ in range(2))
        row_norm(x, where, found, 1e-5, *options)
        row_norm_reference(x, where, expected, 1e-5, *options)
        assert_close(found, expected, dtype)
    assert torch.equal(row_norm(x, where, x, 1e-5, affine).isnan(), expected.isnan())  # in place
    assert_close(x, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_linear_into_other_rows(dtype):
    torch.manual_seed(3)
    where = positions()
    x, weight, bias = draw(len(where), 32, dtype=dtype), draw(32, 40, dtype=dtype, scale=0.2), draw(40)
    target = torch.full_like(where, -1)
    target[50:130] = torch.randperm(90, device=DEVICE)[:80]
    x[target < 0] = torch.nan
    found, expected = (poisoned(90, 120, dtype=dtype) for _ in range(2))
    for linear, out in ((layer_norm_linear, found), (layer_norm_linear_reference, expected)):
        linear(x, weight, bias, where, out[:, 40:80], 1e-5, target=target)
    assert found[:, 40:80].isfinite().all(1).sum() == 80
    assert_close(found, expected, dtype)


@pytest.mark.parametrize(("dtype", "ratio"), grid(DTYPES, [1, 2, 3]))
def test_repeated_rows_go_to_their_places(dtype, ratio):
    torch.manual_seed(5)
    rows, width = 21, 20
    x = draw(rows, width, dtype=dtype)
    target = torch.randperm(ratio * rows).to(DEVICE, torch.int32)
    target[::4] = -1
    found, expected = (poisoned(ratio * rows + 3, 3 * width, dtype=dtype) for _ in range(2))
    repeat_rows(x, target, found[:, width : 2 * width])
    repeat_rows_reference(x, target, expected[:, width : 2 * width])
    assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(found[target[1].item(), width : 2 * width], x[1 // ratio])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("known", [True, False])
def test_filled_rows(dtype, known):
    torch.manual_seed(4)
    rows, count, mels = 32, 21, 20
    noise, speakers = draw(50, mels), draw(3, mels, dtype=dtype)
    mel = draw(9, mels) if known else None
    place = [3, -1, 8, 0] if known else [-1] * 4
    table = torch.full((3, rows), -1, dtype=torch.int32, device=DEVICE)
    table[:2, :count] = torch.stack([torch.randint(n, (count,)) for n in (50, 3)])
    table[2, :4] = torch.tensor(place, device=DEVICE)
    results = []
    for fill in (fill_rows, fill_rows_reference):
        x, inputs = poisoned(rows, mels, dtype=torch.float32), poisoned(2, rows, 4 * mels, dtype=dtype)
        fill(noise, speakers, mel, table, x, inputs)
        results.append((x, inputs))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
    x, inputs = results[0]
    assert torch.equal(x[:count], noise[table[0, :count].long()]) and x[count:].isnan().all()
    assert inputs[0, :count, mels : 2 * mels].isnan().all() and inputs[:, count:].isnan().all()
