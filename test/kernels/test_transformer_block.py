"""A transformer block in one kernel against plain PyTorch, on packed batches of random lengths. On a machine
without a GPU that runs it, the kernel is emulated (support/cuda_on_cpu.h)."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from support import cuda_on_cpu
from support.flow_rows import assert_close, draw, poisoned, positions

from light_tts.kernels.cuda.kernel import available
from light_tts.kernels.flow import transformer_block as kernel
from light_tts.kernels.flow.packed_attention import CachedKeys, Prefix, attention_of_rows
from light_tts.kernels.flow.transformer_block import (
    BLOCK_ROWS,
    FEED,
    HEADS,
    INNER,
    WIDTH,
    BlockWeights,
    Linear,
    transformer_block,
    transformer_block_reference,
)

GPU = torch.device("cuda", 0)
ON_GPU = torch.cuda.is_available() and available(GPU)
DEVICE = GPU if ON_GPU else torch.device("cpu")
COPIES, PAGE, STEPS, LAYERS, EPS = 2, 50, 3, 4, 1e-5
pytestmark = pytest.mark.skipif(not ON_GPU and not cuda_on_cpu.AVAILABLE, reason="neither such a GPU nor g++")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., None]:
    """-> `transformer_block`, and the seed of the order in which emulated threads run"""
    libraries = {}

    def emulated(x, qkv, next_qkv, weights, queries, block_rows, copies, cached, eps, seed=0):
        resident = 2 if block_rows == 32 else 1  # on a GPU, 2 with many rows
        macros = kernel.macros(block_rows, resident, cached is not None, weights.next_qkv is not None)
        name = tuple(macros.values())
        if name not in libraries:
            folder = tmp_path_factory.mktemp("cuda")
            libraries[name] = cuda_on_cpu.build(kernel.SOURCE, ["transformer_block"], macros, folder)
        cuda_on_cpu.launch(
            libraries[name],
            "transformer_block",
            (kernel.BLOCKS * len(queries) // block_rows, copies),
            kernel.shared_bytes(block_rows),
            kernel.parameters(x, qkv, next_qkv, weights, queries, copies, cached, eps),
            seed=seed,
        )

    return (lambda *args, seed=0: transformer_block(*args)) if ON_GPU else emulated


def linear(inputs: int, outputs: int) -> Linear:
    weight = draw(inputs, outputs, dtype=torch.float16, scale=inputs**-0.5)
    return weight.to(DEVICE), draw(outputs, scale=0.1).to(DEVICE)


def weights(has_next: bool = True) -> BlockWeights:
    follower = linear(WIDTH, 3 * INNER) if has_next else None
    found = BlockWeights(HEADS, linear(INNER, WIDTH), linear(WIDTH, FEED), linear(FEED, WIDTH), follower)
    return found.pack()


def both(
    run, lengths, chunks, block_rows, weights, prefixes=None, store=None, pages=(), seed=0, wrong=None
) -> list:
    """Run the kernel and the reference on the same random rows; -> x, next queries, keys and values, and the
    store of each. wrong: queries, keys and values of the first sequence."""
    where = positions(lengths, copies=COPIES).to(DEVICE)
    rows = len(where)
    wide = draw(rows, 2 * WIDTH, dtype=torch.float16).to(DEVICE)  # x has a stride
    qkv = draw(rows, 3 * INNER, dtype=torch.float16).to(DEVICE)
    wide[where < 0], qkv[where < 0] = torch.nan, torch.nan  # must not be read into others
    if wrong is not None:
        qkv.view(COPIES, -1, 3 * INNER)[:, : lengths[0]] = wrong
    count = -(-rows // COPIES // block_rows) * block_rows
    queries = torch.from_numpy(attention_of_rows(lengths, chunks, count, prefixes)).to(DEVICE)
    found = []
    for call in (lambda *args: run(*args, seed=seed), transformer_block_reference):
        x, next_qkv = wide.clone()[:, WIDTH:], poisoned(rows, 3 * INNER, dtype=torch.float16).to(DEVICE)
        own_store, cached = None, None
        if store is not None:
            own_store = store.clone()
            numbers = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (pages, [1])]
            cached = CachedKeys(own_store[:, :, 2], *numbers)
        call(x, qkv, next_qkv, weights, queries, block_rows, COPIES, cached, EPS)
        found.append((x, next_qkv, own_store))
    return found


@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
def test_a_block_and_the_queries_of_the_next(run, block_rows):
    """The third 16 rows are of three sequences, the last ones of one that ends before them, and of none."""
    torch.manual_seed(block_rows)
    (x, qkv, _), (other_x, other_qkv, _) = both(run, (37, 1, 84), (0, 5, 50), block_rows, weights())
    assert_close(x, other_x, torch.float16)
    assert_close(qkv, other_qkv, torch.float16)


@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
def test_the_last_block_of_a_stage_after_pages(run, block_rows):
    """The first sequence goes on after two pages and keeps one more, the second, with full attention, goes on
    after one and keeps none, the third begins and keeps one, the others keep none. The fourth 16 rows are of
    three sequences with 288 keys, more than the warps have at once."""
    torch.manual_seed(1)
    prefixes = [Prefix(100, 0, 150), Prefix(50, 4, 50), Prefix(0, 3, 50), Prefix(100, 0, 100), Prefix()]
    store = draw(6, STEPS, LAYERS, COPIES, PAGE, 2 * INNER, dtype=torch.float16).to(DEVICE)
    pages = [5, 2, 4, 1, 0]
    store[[4, 1]] = torch.nan  # written by this call
    lengths, chunks = (50, 9, 50, 6, 5), (50, 0, 50, 50, 0)
    found, expected = both(run, lengths, chunks, block_rows, weights(False), prefixes, store, pages)
    assert_close(found[0], expected[0], torch.float16)
    assert found[1].isnan().all()
    assert torch.equal(found[2].nan_to_num(), expected[2].nan_to_num())


def test_a_sequence_that_is_not_finite_leaves_its_neighbours_alone(run):
    """They share 16 rows with it."""
    lengths, layers, found = (9, 31), weights(), []
    for wrong in (None, torch.nan):
        torch.manual_seed(5)
        found.append(both(run, lengths, (0, 0), 16, layers, wrong=wrong)[0][:2])
    others = positions(lengths, copies=COPIES).view(COPIES, -1)
    others[:, : lengths[0]] = -1
    kept = (others.flatten() >= 0).to(DEVICE)
    for usual, beside_wrong in zip(*found, strict=True):
        assert torch.equal(beside_wrong[kept], usual[kept])
        assert not beside_wrong[: lengths[0]].isfinite().all()


@pytest.mark.skipif(not ON_GPU, reason="no such GPU")
def test_many_rows_have_two_thread_blocks_a_multiprocessor(run):
    torch.manual_seed(4)
    (x, qkv, _), (other_x, other_qkv, _) = both(run, (70, 200, 250), (50, 0, 50), 32, weights())
    assert_close(x, other_x, torch.float16)
    assert_close(qkv, other_qkv, torch.float16)


def test_the_order_of_threads_does_not_matter(run):
    torch.manual_seed(2)
    layers = weights()
    found = []
    for seed in range(4):
        torch.manual_seed(3)
        found.append(both(run, (9, 31), (0, 0), 16, layers, seed=seed)[0][:2])
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert torch.equal(first.nan_to_num(), other.nan_to_num())
