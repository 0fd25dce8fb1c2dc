"""The flow's kernels against plain PyTorch, on packed batches of random lengths. On a machine without a GPU
they run in Triton's interpreter."""

import pytest
import torch
from support.interpreter import grid

from light_tts.kernels.flow.euler_step import flow_step, flow_step_reference
from light_tts.kernels.flow.packed_attention import (
    attention_blocks,
    packed_attention,
    packed_attention_reference,
)
from light_tts.kernels.flow.packed_conv import Norm, Residual, packed_conv, packed_conv_reference
from light_tts.kernels.flow.packed_linear import (
    fold_layer_norm,
    layer_norm_linear,
    layer_norm_linear_reference,
    linear,
    linear_add_reference_,
    linear_reference,
    packed_linear_add_,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative to the reference in float32 from the same operands: rounding of the result and of what is
# multiplied in between.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
LENGTHS, SPARE = (37, 1, 64, 90), 16  # frames of each sequence; rows without meaning at the end


def positions(lengths=LENGTHS, spare=SPARE, copies=1) -> torch.Tensor:
    one = torch.cat([torch.arange(length) for length in lengths] + [torch.full((spare,), -1)])
    return one.repeat(copies).to(DEVICE, torch.int32)


def draw(*shape: int, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def poisoned(*shape: int, dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal within the tolerance where there is meaning; untouched (NaN in both) elsewhere."""
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.double().nan_to_num(), expected.double().nan_to_num()
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels_in", "channels_out", "extras"),
    [(80, 32, False), (64, 64, True), (24, 48, True), (320, 256, True)],
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
            "shift": draw(10, channels_out),
            "step": torch.tensor([7], dtype=torch.int32, device=DEVICE),
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
    ("dtype", "gelu", "widths"), grid(DTYPES, [False, True], [(32, 72), (64, 130), (256, 1536)])
)
def test_norm_linear(dtype, gelu, widths):
    torch.manual_seed(1)
    width, out_width = widths
    where = positions()
    x = draw(len(where), width, dtype=dtype) + 1
    gain, offset, weight, bias = draw(width), draw(width), draw(out_width, width), draw(out_width)
    folded, folded_bias = fold_layer_norm(gain, offset, weight * width**-0.5, bias)
    found, expected = (poisoned(len(where), out_width, dtype=dtype) for _ in range(2))
    arguments = folded.to(dtype), folded_bias, where
    layer_norm_linear(x, *arguments, found, 1e-5, gelu)
    layer_norm_linear_reference(x, *arguments, expected, 1e-5, gelu)
    assert_close(found, expected, dtype)
    linear(x, *arguments, found, gelu)
    linear_reference(x, *arguments, expected, gelu)
    assert_close(found, expected, dtype)


def test_folded_norm_is_the_norm():
    torch.manual_seed(2)
    x, gain, offset, weight, bias = draw(9, 32), draw(32), draw(32), draw(72, 32), draw(72)
    plain = torch.nn.functional.linear(
        torch.nn.functional.layer_norm(x, (32,), gain, offset, 1e-5), weight, bias
    )
    folded, folded_bias = fold_layer_norm(gain, offset, weight, bias)
    where = torch.arange(9, dtype=torch.int32, device=DEVICE)
    out = layer_norm_linear_reference(
        x, folded, folded_bias, where, poisoned(9, 72, dtype=x.dtype), 1e-5, False
    )
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
    linear_add_reference_(other[:, out_width:], y, weight, bias, where, normal_expected, 1e-5)
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


def test_more_blocks_than_fit_are_refused():
    with pytest.raises(ValueError, match="3 blocks"):
        attention_blocks([64, 33], [0, 0], 33, count=2)


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
