"""Every kernel of the language model against its PyTorch reference, on the GPU where there is one, else in
Triton's interpreter (see conftest.py)."""

# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from support.interpreter import grid
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl

from light_tts.common import random
from light_tts.common.kv_pool import quantize
from light_tts.common.sampling_rule import GREEDY, SamplingRule
from light_tts.kernels import arrival, configs, overlap
from light_tts.kernels.cuda.kernel import available
from light_tts.kernels.launch import Config
from light_tts.kernels.llm.activation import silu_mul, silu_mul_reference
from light_tts.kernels.llm.decode_attention import decode_attention, decode_attention_reference
from light_tts.kernels.llm.norm import add_rms_norm_, add_rms_norm_reference_, rms_norm, rms_norm_reference
from light_tts.kernels.llm.prefill_attention import (
    prefill_attention,
    prefill_attention_reference,
    prefill_blocks,
)
from light_tts.kernels.llm.rotary import rotary_kv_write, rotary_kv_write_reference
from light_tts.kernels.llm.row_linear import row_linear
from light_tts.kernels.llm.row_state import RowState, advance, advance_reference, write_rows
from light_tts.kernels.llm.sampling import sample, sample_reference
from light_tts.kernels.llm.slot_table import write_slots, write_slots_reference
from light_tts.kernels.llm.small_linear import (
    fold_rms_norm,
    linear_add_,
    linear_add_reference_,
    norm_gate_up_silu,
    norm_gate_up_silu_reference,
    rms_norm_linear,
    rms_norm_linear_reference,
)
from light_tts.kernels.llm.tensor_linear import TensorLinear
from light_tts.kernels.random import gumbel, gumbel_estimate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter multiplies bfloat16 matrices as if they were integers.
DOT_DTYPES = DTYPES if DEVICE.type == "cuda" else DTYPES[:2]
GOLDEN = (4, 2, 16)  # heads, kv heads, head_dim of the small checkpoint
FULL = (14, 2, 64)  # of CosyVoice2-0.5B
SHAPES = [GOLDEN, FULL]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def ints(values: list[int] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(DEVICE)


def close(actual: Tensor, expected: Tensor, steps: float = 1.0) -> None:
    """Equal within `steps` units in the last place of the dtype, relative to the largest value."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual.float() - expected.float()).abs().max()
    bound = steps * torch.finfo(expected.dtype).eps * expected.float().abs().max().clamp(min=1e-6)
    assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,size", [(3, 64), (2, 896)])
def test_norm(tokens: int, size: int, dtype: torch.dtype) -> None:
    x = randn(tokens, size, dtype=dtype)
    close(rms_norm(x, 1e-6), rms_norm_reference(x, 1e-6), 2)

    residual = randn(tokens, size, dtype=dtype, seed=2)
    expected_residual = residual.clone()
    expected = add_rms_norm_reference_(expected_residual, x, 1e-6)
    close(add_rms_norm_(residual, x, 1e-6), expected, 2)
    close(residual, expected_residual, 1)  # the interpreter rounds bfloat16 towards zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [128, 4864])
def test_silu_mul(size: int, dtype: torch.dtype) -> None:
    x = 3 * randn(3, 2 * size, dtype=dtype)
    close(silu_mul(x), silu_mul_reference(x), 2)


class Pool:
    """One layer of a pool; `fill` puts random tokens into the first slots."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, int8: bool, slots: int) -> None:
        _, kv_heads, head_dim = shape
        stored = torch.int8 if int8 else dtype
        self.k, self.v = (
            torch.zeros(slots, kv_heads, head_dim, dtype=stored, device=DEVICE) for _ in range(2)
        )
        self.k_scale, self.v_scale = (
            torch.zeros(slots, kv_heads, dtype=dtype, device=DEVICE) if int8 else None for _ in range(2)
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.k, self.v, self.k_scale, self.v_scale


def rope(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.parametrize("dtype,int8,shape", grid(DTYPES, [False, True], SHAPES))
def test_rotary_kv_write(dtype: torch.dtype, int8: bool, shape: tuple[int, int, int]) -> None:
    heads, kv_heads, head_dim = shape
    tokens = 5
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    qkv[1] = 0
    positions, slots = ints([0, 7, 39, 3, 0]), ints([4, 9, 0, 5, -1])
    tables = rope(40, head_dim)
    pool, expected_pool = (Pool(shape, dtype, int8, slots=10) for _ in range(2))
    q = rotary_kv_write(qkv, tables, positions, slots, pool.tensors)
    expected = rotary_kv_write_reference(qkv, tables, positions, slots, expected_pool.tensors)
    close(q, expected, 1)
    for part, expected in zip(pool.tensors, expected_pool.tensors, strict=True):
        if part is None:
            continue
        if part.dtype == torch.int8:  # a value that lies between two steps may fall on either side
            assert (part.int() - expected.int()).abs().max() <= 1
            assert (part != expected).float().mean() < 0.05
        else:
            close(part, expected, 2)


def filled_pool(
    shape: tuple[int, int, int], dtype: torch.dtype, int8: bool, rows: int, max_len: int
) -> tuple[Pool, Tensor]:
    """A pool with random tokens in all slots, and a table to them in random order."""
    slots = rows * max_len
    pool = Pool(shape, dtype, int8, slots)
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(3))
    for seed, (stored, scales) in enumerate(((pool.k, pool.k_scale), (pool.v, pool.v_scale))):
        x = randn(*stored.shape, dtype=dtype, seed=seed)
        if int8:
            stored[:], scales[:] = quantize(x)
        else:
            stored[:] = x
    return pool, ints(order.reshape(rows, max_len))


def qkv_of(tokens: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    heads, kv_heads, head_dim = shape
    return randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=5)


@pytest.mark.parametrize("split,dtype,int8,shape", grid([16, 32, 256], DOT_DTYPES, [False, True], SHAPES))
def test_decode_attention(split: int, dtype: torch.dtype, int8: bool, shape: tuple[int, int, int]) -> None:
    pool, table = filled_pool(shape, dtype, int8, rows=6, max_len=200)
    expected_pool, _ = filled_pool(shape, dtype, int8, rows=6, max_len=200)
    rows, lengths = ints([3, 0, -1, 4, 2, 1, 5]), ints([1, 200, 0, 32, 33, 129, 16])
    qkv, tables = qkv_of(len(rows), shape, dtype), rope(200, shape[2])
    where = (table, rows, lengths, 256)
    out = decode_attention(qkv, tables, pool.tensors, *where, {"BLOCK": 16, "SPLIT": split, "num_warps": 4})
    expected = decode_attention_reference(qkv, tables, expected_pool.tensors, *where)
    close(out, expected, 8 if int8 else 4)  # int8: a value between two steps may fall on either side
    assert (out[2] == 0).all()
    assert (arrival.counters(qkv.device) == 0).all()
    for part, expected in zip(pool.tensors, expected_pool.tensors, strict=True):
        if part is not None and part.dtype == torch.int8:
            assert (part.int() - expected.int()).abs().max() <= 1
        elif part is not None:
            close(part, expected, 2)


def test_decode_attention_does_not_depend_on_the_batch() -> None:
    pool, table = filled_pool(GOLDEN, torch.float16, False, rows=3, max_len=200)
    qkv, rows, lengths = qkv_of(3, GOLDEN, torch.float16), ints([0, 1, 2]), ints([200, 70, 130])
    tables = rope(200, GOLDEN[2])

    def attend(tokens: slice) -> Tensor:
        where = (table, rows[tokens], lengths[tokens], 256, {"BLOCK": 64, "SPLIT": 128, "num_warps": 4})
        return decode_attention(qkv[tokens], tables, pool.tensors, *where)

    together = attend(slice(0, 3))
    for i in range(3):
        assert torch.equal(attend(slice(i, i + 1))[0], together[i])


@pytest.mark.parametrize("dtype,int8,shape", grid(DOT_DTYPES, [False, True], SHAPES))
def test_prefill_attention(dtype: torch.dtype, int8: bool, shape: tuple[int, int, int]) -> None:
    heads, _, head_dim = shape
    pool, table = filled_pool(shape, dtype, int8, rows=4, max_len=200)
    starts, lengths = [0, 30, 0, 199], [70, 64, 3, 1]
    offsets = [sum(lengths[:i]) for i in range(4)]
    spans = [ints(x) for x in ([2, 0, 3, 1], starts, lengths, offsets)]
    blocks = ints([*prefill_blocks(lengths), (-1, 0), (-1, 0)])
    q = randn(sum(lengths) + 2, heads, head_dim, dtype=dtype, seed=5)
    out = prefill_attention(q, pool.tensors, table, *spans, blocks)
    expected = prefill_attention_reference(q, pool.tensors, table, *spans, blocks)
    close(out[:-2], expected[:-2], 4)


@pytest.mark.parametrize("batch", [3, 70])
def test_advance(batch: int) -> None:
    states = [RowState.empty(200, 10, 3, DEVICE) for _ in range(2)]
    for state in states:
        state.next_id.copy_(torch.arange(200) * 3)
        state.position.copy_(torch.arange(200) % 7)
    embedding = randn(600, 96)
    generator = torch.Generator().manual_seed(0)
    schedule = ints(torch.stack([torch.randperm(200, generator=generator)[:batch] for _ in range(2)]))
    schedule[:, 1] = -1
    for step in range(2):
        steps = torch.full((batch,), step, device=DEVICE)
        outputs = [f(state, embedding, schedule, steps) for f, state in zip(ADVANCE, states, strict=True)]
        for a, b in zip(*outputs, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(states[0].position, states[1].position)


ADVANCE = (advance, advance_reference)


@pytest.mark.parametrize("special_ids", [3, 200])
def test_write_rows(special_ids: int) -> None:
    states = [RowState.empty(40, 10, special_ids, DEVICE) for _ in range(2)]
    for state in states:
        state.words.fill_(5)
    rows = ints([7, -1, 0, 39, -1])
    records = torch.randint(-(2**31), 2**31 - 1, (5, len(states[0].places)), dtype=torch.int32).to(DEVICE)
    write_rows(states[0], rows, records)
    states[1].write(rows, records)
    assert torch.equal(states[0].words, states[1].words)
    assert (states[0].words != 5).sum() > 2.9 * records.shape[1]


def test_write_slots() -> None:
    lengths = [70, 0, 1, 64]
    spans = (ints([3, 0, 1, 4]), ints([0, 0, 99, 5]), ints(lengths), ints([0, 70, 70, 71]))
    blocks = ints([*prefill_blocks(lengths), (-1, 0), (-1, -1)])
    slots = ints([*range(1000, 1135), -1, -1])
    tables = [torch.full((5, 100), 7, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    write_slots(tables[0], slots, *spans, blocks)
    write_slots_reference(tables[1], slots, *spans, blocks)
    assert torch.equal(*tables) and (tables[0] == 7).sum() == 500 - 135


def test_gumbel() -> None:
    """The same bits; the logarithms of two libraries may differ by one step of float32."""
    n = 4096
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(-(2**62), 2**62, (n,), generator=generator).to(DEVICE)
    for seed, stream in ((0, 0), (-5, 2 << 32), (2**62 + 1, (3 << 32) + 7), (2**40, 2**63 - 1)):
        seed, stream = (torch.tensor([x], device=DEVICE) for x in (seed, stream))
        out, estimate = torch.empty(2, n, device=DEVICE)
        gumbel_kernel[(1,)](seed, stream, counters, out, estimate, N=n)
        expected = random.gumbel(seed, stream, counters)
        torch.testing.assert_close(out, expected, rtol=2e-7, atol=2e-7)
        torch.testing.assert_close(estimate, expected, rtol=0, atol=1e-4)


@triton.jit
def gumbel_kernel(seed, stream, counters, out, estimate, N: tl.constexpr):
    i = tl.arange(0, N)
    seed, stream, counters = tl.load(seed), tl.load(stream), tl.load(counters + i)
    tl.store(out + i, gumbel(seed, stream, counters))
    tl.store(estimate + i, gumbel_estimate(seed, stream, counters))


def set_rules(state: RowState, *rules: SamplingRule) -> None:
    """The rows take turns with them."""
    for row, rule in zip(range(len(state.seed)), itertools.cycle(rules), strict=False):
        for name in ("top_p", "top_k", "win_size", "repeats", "inverse_temperature"):
            getattr(state, name)[row] = getattr(rule, name)


def filled_state(rows: int, likely: Tensor, special_ids: int) -> RowState:
    """Requests in the middle of their parts. likely: (rows, n) ids to have come up lately"""
    generator = torch.Generator().manual_seed(1)
    state = RowState.empty(rows, 10, special_ids, DEVICE)
    state.seed.copy_(torch.randint(-(2**62), 2**62, (rows,), generator=generator))
    state.part.copy_(torch.arange(rows) % 3)
    state.step.copy_(torch.arange(rows) * 50)
    state.min_outputs.copy_(torch.tensor([0, 10**6] * rows)[:rows])
    state.bans.copy_(torch.randint(0, 3, (rows, special_ids), generator=generator))
    for row in range(rows):
        state.history[row, 10 - row % 11 :] = likely[row, : row % 11].to(DEVICE)
    return state


RULE = SamplingRule(top_p=0.8, top_k=25, win_size=10, tau_r=0.1)


def check_samples(logits: Tensor, *rules: SamplingRule, steps: int = 2, special_ids: int = 3) -> Tensor:
    """Token for token those of the reference, and the same changes of the state; the rows take turns with the
    rules. -> the lines written"""
    rows, vocabulary = logits.shape
    likely = logits.float().argsort(descending=True)[:, :10].repeat(1, 10)[:, :10]
    max_top_k = max(rule.top_k for rule in rules)
    states = [filled_state(rows, likely, special_ids) for _ in range(2)]
    for state in states:
        set_rules(state, *rules)
    batch = ints(torch.arange(rows).flip(0))
    batch[3:4] = -1
    outs = [ints([[7] * rows] * (steps + 1)) for _ in range(2)]
    lines = [torch.arange(rows, device=DEVICE) % 2 for _ in range(2)]
    for _ in range(steps):
        for function, state, out, line in zip((sample, sample_reference), states, outs, lines, strict=True):
            function(logits, state, batch, out, line, 1000, vocabulary - special_ids, max_top_k)
        assert torch.equal(*outs) and torch.equal(*lines)
        assert torch.equal(states[0].words, states[1].words)  # all fields
    return outs[0]


@pytest.mark.parametrize(
    "dtype,sizes,rule", grid(DTYPES[:2], [(200, 24, 3), (732, 6, 0.3), (6564, 8, 3)], [RULE, GREEDY])
)
def test_sample(dtype: torch.dtype, sizes: tuple[int, int, float], rule: SamplingRule) -> None:
    """Half precision logits have many ties."""
    vocabulary, rows, spread = sizes
    logits = (spread * randn(rows, vocabulary)).to(dtype)
    logits[:, -3:] += 2 * spread
    assert check_samples(logits, rule)[:, 3].tolist() == [7, -1, -1]


@pytest.mark.parametrize("vocabulary", [4, 20, 70, 1024])
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_sample_of_other_sizes(vocabulary: int, top_k: int) -> None:
    check_samples(2 * randn(3, vocabulary), dataclasses.replace(RULE, top_k=top_k, top_p=0.95))


@pytest.mark.parametrize("special_ids", [1, 200, 256])
def test_sample_with_any_number_of_special_ids(special_ids: int) -> None:
    """Most likely of all, so that bans decide."""
    logits = randn(6, 600)
    logits[:, -special_ids:] += 5
    check_samples(logits, RULE, special_ids=special_ids)


def test_sample_of_padded_rows() -> None:
    check_samples(3 * randn(3, 208)[:, :201], RULE)


MIXED = [
    RULE,
    SamplingRule(top_p=0.5, top_k=8, win_size=10, tau_r=0.2),
    SamplingRule(top_p=0.99, top_k=64, win_size=7, tau_r=0.01, temperature=2.0),
    GREEDY,
    SamplingRule(top_p=1.0, top_k=30, win_size=3, tau_r=0.3, temperature=0.1),
]


@pytest.mark.parametrize("vocabulary", [200, 6564])
def test_each_request_is_sampled_by_its_own_rule(vocabulary: int) -> None:
    """In the same batch; and what a row draws does not depend on the rules of the others."""
    rows = 9
    logits = 3 * randn(rows, vocabulary)
    mixed = check_samples(logits, *MIXED)
    for number in (0, 1):
        alone = check_samples(logits, MIXED[number])
        columns = [rows - 1 - row for row in range(number, rows, len(MIXED))]
        assert torch.equal(mixed[:, columns], alone[:, columns]) and not torch.equal(mixed, alone)


def clustered(logits: Tensor) -> None:
    """More likely ids than are compared with one another, in one segment."""
    logits[:, 5::64] += 10


def neighbours(logits: Tensor) -> None:
    """As many likely ids as the nucleus may have, each in a segment of its own."""
    logits[:, 100:125] = 10 + 0.01 * torch.arange(25, device=DEVICE)


def flat(logits: Tensor) -> None:
    logits.zero_()


def of_few_values(logits: Tensor) -> None:
    logits.round_()


def peaked(logits: Tensor) -> None:
    logits[:, 77] += 30


def nearly_impossible(logits: Tensor) -> None:
    """Fewer ids than the nucleus may have; of one row only one, which is drawn again."""
    logits[:, 20:] = -torch.inf
    logits[1, 1:] = -torch.inf


@pytest.mark.parametrize("change", [clustered, neighbours, flat, of_few_values, peaked, nearly_impossible])
def test_sample_of_unusual_logits(change: Callable[[Tensor], None]) -> None:
    logits = randn(5, 6564)
    change(logits)
    check_samples(logits, dataclasses.replace(RULE, top_p=0.99), steps=4)


def test_sample_draws_again_what_repeats() -> None:
    logits = torch.full((1, 200), -4.0, device=DEVICE)
    logits[0, 5] = 8
    state = RowState.empty(1, 10, 3, DEVICE)
    set_rules(state, RULE)
    out, row = ints([[0]]), ints([0])
    drawn = []
    for _ in range(12):
        sample(logits, state, row, out, None, 1000, 197)
        drawn.append(out.item())
    assert drawn[0] == 5 and drawn[11] == 5
    assert 5 not in drawn[1:11]
    assert state.history[0].tolist() == drawn[2:]
    assert state.next_id.item() == 1000 + drawn[-1] and state.step.item() == 12


def test_sample_draws_again_by_exact_noise() -> None:
    """Ids that differ by less than the error of the estimate."""
    state = RowState.empty(1, 10, 3, DEVICE)
    state.history.fill_(5)
    set_rules(state, RULE)
    logits = torch.full((1, 200), -50.0, device=DEVICE)
    logits[0, 5] = 50
    noise = random.gumbel(0, random.stream_of(random.Purpose.FALLBACK, 0), torch.arange(10, 40))
    logits[0, 10:40] = (2e-5 * torch.arange(30) - noise).to(DEVICE)
    out = ints([[0]])
    sample(logits, state, ints([0]), out, None, 1000, 197)
    assert out.item() == 39


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
def test_sample_stays_in_the_vocabulary_without_numbers() -> None:
    for value, ids in itertools.product((torch.nan, -torch.nan, torch.inf, -torch.inf), (1, 100, 200)):
        logits = randn(1, 200)
        logits[:, :ids] = value
        state = RowState.empty(1, 10, 3, DEVICE)
        set_rules(state, RULE)
        out = ints([[0]])
        for _ in range(2):
            sample(logits, state, ints([0]), out, None, 1000, 197)
            assert 0 <= out.item() < 200


# Allowed error of a long sum, rounded to the dtype at its end.
SUM_STEPS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}
# rows, inputs, outputs: whole tiles, and none of them whole; up to 8 rows have a kernel of their own
LINEAR_SIZES = [(1, 896, 96), (2, 896, 96), (5, 64, 40), (9, 896, 96), (17, 200, 33), (64, 128, 64)]


def linear_inputs(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x with a row as large and one as small as they come; weight"""
    x = randn(rows, inputs, dtype=dtype)
    x[0, 3] = 6e4
    x[-1] *= 0.01
    return x, randn(outputs, inputs, dtype=dtype, seed=2) * inputs**-0.5


@pytest.mark.parametrize("rows,inputs,outputs", LINEAR_SIZES)
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_norm_linear(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, weight = linear_inputs(rows, inputs, outputs, dtype)
    bias = randn(outputs, dtype=dtype, seed=3)
    for b in (bias, None):
        out = rms_norm_linear(x, 1e-6, weight, b)
        for row, expected in zip(out, rms_norm_linear_reference(x, 1e-6, weight, b), strict=True):
            close(row, expected, SUM_STEPS[dtype])


@pytest.mark.parametrize("rows,inputs,outputs", LINEAR_SIZES)
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_norm_gate_up_silu(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, weight = linear_inputs(rows, inputs, 2 * outputs, dtype)
    out = norm_gate_up_silu(x, 1e-6, weight)
    for row, expected in zip(out, norm_gate_up_silu_reference(x, 1e-6, weight), strict=True):
        close(row, expected, SUM_STEPS[dtype])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_folded_norm(dtype: torch.dtype) -> None:
    x, norm_weight = randn(3, 200, dtype=dtype), 1 + 0.5 * randn(200, dtype=dtype, seed=1)
    weight = randn(40, 200, dtype=dtype, seed=2) / 14
    normed = torch.nn.functional.rms_norm(x.double(), (200,), norm_weight.double(), 1e-6)
    expected = (normed @ weight.double().T).to(dtype)
    close(rms_norm_linear_reference(x, 1e-6, fold_rms_norm(weight, norm_weight), None), expected, 8)


@pytest.mark.parametrize(
    "rows,config,size",
    grid(
        [1, 3, 8],
        [{"BLOCK_OUT": outputs, "num_warps": warps} for outputs, warps in ((2, 8), (8, 4), (16, 4))],
        [(200, 33), (896, 64), (4864, 30)],
    ),
)
def test_row_linear_configurations(rows: int, config: Config, size: tuple[int, int]) -> None:
    dtype = torch.float16
    inputs, outputs = size
    y, residual = randn(rows, inputs, dtype=dtype), randn(rows, outputs, dtype=dtype, seed=1)
    weight = randn(outputs, inputs, dtype=dtype, seed=2) * inputs**-0.5
    expected = residual.clone()
    linear_add_reference_(expected, y, weight)
    row_linear(y, weight, residual, add=True, config=config)
    close(residual, expected, SUM_STEPS[dtype])


@pytest.mark.parametrize("dtype,size,splits", grid(DOT_DTYPES, LINEAR_SIZES, [1, 3, 4]))
def test_linear_add(dtype: torch.dtype, size: tuple[int, int, int], splits: int) -> None:
    rows, inputs, outputs = size
    y, residual = randn(rows, inputs, dtype=dtype), randn(rows, outputs, dtype=dtype, seed=1)
    weight = randn(outputs, inputs, dtype=dtype, seed=2) * inputs**-0.5
    expected = residual.clone()
    linear_add_reference_(expected, y, weight)
    again = residual.clone()
    linear_add_(again, y, weight)
    config = {"BLOCK_OUT": 16, "BLOCK_K": 64, "SPLITS": splits, "num_warps": 4, "num_stages": 4}
    linear_add_(residual, y, weight, config)
    for actual in (again, residual):
        close(actual, expected, SUM_STEPS[dtype])
    assert (arrival.counters(y.device) == 0).all()


def test_small_linear_refuses_many_rows() -> None:
    with pytest.raises(ValueError, match="65 rows"):
        linear_add_(randn(65, 16), randn(65, 16), randn(16, 16))


def test_overlap_is_chosen_by_kernel_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "load", lambda device: {"overlap": {"llm": [[1, 8], [20, 30]]}})
    chosen = [bool(overlap.options(DEVICE, "llm", rows)) for rows in (1, 8, 9, 20, 31)]
    assert chosen == [True, True, False, True, False]
    assert not overlap.options(DEVICE, "packed_conv", 1)
    monkeypatch.setattr(configs, "load", lambda device: {})
    assert not overlap.options(DEVICE, "llm", 1)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_chain_of_kernels_repeats_exactly(rows: int, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer as a CUDA graph: programs arrive in any order, and kernels may overlap; the result must not
    show it, and be that of the references."""
    dtype, head_dim, eps = torch.float16, FULL[-1], 1e-6
    sizes = [(1152, 896), (896, 896), (9728, 896), (896, 4864)]
    weights = [randn(*size, dtype=dtype, seed=i) * size[1] ** -0.5 for i, size in enumerate(sizes)]
    bias = randn(1152, dtype=dtype, seed=5)
    pool, table = filled_pool(FULL, dtype, False, rows=rows, max_len=1024)
    row, lengths = ints(torch.arange(rows)), ints(torch.arange(1, rows + 1) * (1024 // rows))
    tables, start = rope(1024, head_dim), randn(rows, 896, dtype=dtype, seed=7)

    if cuda and not available(DEVICE):
        pytest.skip("not for this GPU")
    to_qkv, to_out = TensorLinear(weights[0], bias, eps), TensorLinear(weights[1])
    gate_up, down = TensorLinear(weights[2], eps=eps, gated=True), TensorLinear(weights[3])
    to_qkv.later, down.later = gate_up, to_out

    def layer() -> Tensor:
        x = start.clone()
        if cuda:
            attended = decode_attention(to_qkv(x), tables, pool.tensors, table, row, lengths, 1024)
            to_out(attended.flatten(1), x)
            return down(gate_up(x), x)
        qkv = rms_norm_linear(x, eps, weights[0], bias)
        attended = decode_attention(qkv, tables, pool.tensors, table, row, lengths, 1024)
        linear_add_(x, attended.flatten(1), weights[1])
        linear_add_(x, norm_gate_up_silu(x, eps, weights[2]), weights[3])
        return x

    def layer_reference() -> Tensor:
        x = start.clone()
        qkv = rms_norm_linear_reference(x, eps, weights[0], bias)
        attended = decode_attention_reference(qkv, tables, pool.tensors, table, row, lengths, 1024)
        linear_add_reference_(x, attended.flatten(1), weights[1])
        linear_add_reference_(x, norm_gate_up_silu_reference(x, eps, weights[2]), weights[3])
        return x

    expected = layer_reference()
    results = []
    for value in (False, True):
        monkeypatch.setattr(overlap, "enabled", lambda *_, value=value: value)
        layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                result = layer()
        for _ in range(20):
            result.zero_()
            graph.replay()
            results.append(result.clone())
    close(results[0], expected, 16)
    assert all(torch.equal(result, results[0]) for result in results)
    assert (arrival.counters(start.device) == 0).all()
