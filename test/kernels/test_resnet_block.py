"""A residual block in one kernel against plain PyTorch, on packed batches. On a machine without a GPU that
runs it, the kernel is emulated (support/cuda_on_cpu.h)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from support import cuda_on_cpu
from support.flow_rows import assert_close, draw, poisoned, positions

from light_tts.kernels.cuda.kernel import available
from light_tts.kernels.flow import resnet_block as kernel
from light_tts.kernels.flow.packed_conv import CachedEdges, Norm
from light_tts.kernels.flow.resnet_block import (
    TAPS,
    UNUSED,
    ResnetWeights,
    has_room,
    line_count,
    lines_of,
    resnet_block,
    resnet_block_reference,
)
from light_tts.kernels.flow.transformer_block import INNER, WIDTH, Linear

GPU = torch.device("cuda", 0)
ON_GPU = torch.cuda.is_available() and available(GPU)
DEVICE = GPU if ON_GPU else torch.device("cpu")
COPIES, STEPS, PAGES, EPS = 2, 3, 6, 1e-5
LENGTHS = (16, 1, 3, 50, 2)
SIZES = [(16, 256), (16, 512), (32, 320), (48, 256), (64, 512)]  # rows of a tile, channels
# Each number of rows and of channels; each kernel takes long to compile for the emulator.
SOME_SIZES = SIZES if ON_GPU else [size for size in SIZES if size != (16, 512)]
pytestmark = pytest.mark.skipif(not ON_GPU and not cuda_on_cpu.AVAILABLE, reason="neither such a GPU nor g++")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., None]:
    """-> `resnet_block`, and the seed of the order in which emulated threads run"""
    libraries = {}

    def emulated(x, out, qkv, weights, lines, block_rows, copies, step, cached, eps, new_step=True, seed=0):
        macros = kernel.macros(block_rows, cached is not None, x.shape[1])
        name = tuple(macros.values())
        if name not in libraries:
            folder = tmp_path_factory.mktemp("cuda")
            libraries[name] = cuda_on_cpu.build(kernel.SOURCE, ["resnet_block"], macros, folder)
        cuda_on_cpu.launch(
            libraries[name],
            "resnet_block",
            (kernel.BLOCKS * kernel.tile_count(lines, block_rows), copies),
            kernel.shared_bytes(block_rows, x.shape[1]),
            kernel.parameters(x, out, qkv, weights, lines, copies, step, cached, eps, new_step),
            seed=seed,
        )

    return (lambda *args, seed=0: resnet_block(*args)) if ON_GPU else emulated


def layer(*sizes: int) -> Linear:
    """-> weight and bias"""
    scale = torch.Size(sizes[:-1]).numel() ** -0.5
    return draw(*sizes, dtype=torch.float16, scale=scale).to(DEVICE), draw(sizes[-1], scale=0.1).to(DEVICE)


def norm(eps: float) -> Norm:
    return Norm((draw(WIDTH) + 1).to(DEVICE), draw(WIDTH).to(DEVICE), eps)


def weights(inputs: int) -> ResnetWeights:
    return ResnetWeights(
        layer(TAPS, inputs, WIDTH),
        norm(1e-5),
        draw(STEPS, WIDTH).to(DEVICE),
        layer(TAPS, WIDTH, WIDTH),
        norm(1e-3),
        layer(inputs, WIDTH),
        layer(WIDTH, 3 * INNER),
    ).pack()


def both(run, weights, block_rows, lengths=LENGTHS, before=None, keep=None, seed=0) -> list:
    """Run the kernel and the reference on the same random rows; -> result, queries, keys and values, and the
    stores of each. before, keep: of the rows of a copy"""
    inputs = weights.side[0].shape[0]
    where = positions(lengths, copies=COPIES).to(DEVICE)
    rows = len(where)
    x = draw(rows, inputs + 8, dtype=torch.float16).to(DEVICE)[:, :inputs]  # has a stride
    x[where < 0] = torch.nan  # must not be read into others
    count = line_count(sum(lengths) + 2 * len(lengths) + block_rows, block_rows)  # the last tiles are empty
    table = lines_of(lengths, count, None if before is None else np.array(before))
    lines = torch.from_numpy(table).to(DEVICE)
    step = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    stores = []
    if before is not None:
        stores = [draw(PAGES, STEPS, COPIES, 2, size, dtype=torch.float16) for size in (inputs, WIDTH)]
        tables = [torch.tensor(each + [-1] * (rows // COPIES - len(each))) for each in (before, keep)]
        tables = [each.repeat(COPIES).to(DEVICE, torch.int32) for each in tables]
    found = []
    for call in (lambda *args: run(*args, seed=seed), resnet_block_reference):
        out = poisoned(rows, 2 * WIDTH, dtype=torch.float16).to(DEVICE)
        qkv = poisoned(rows, 3 * INNER, dtype=torch.float16).to(DEVICE)
        own = [store.to(DEVICE, copy=True) for store in stores]
        cached = (CachedEdges(own[0], *tables, step), CachedEdges(own[1], *tables, step)) if own else None
        operand = x if call is not resnet_block_reference else x.nan_to_num()
        call(operand, out[:, WIDTH:], qkv, weights, lines, block_rows, COPIES, step, cached, EPS, not own)
        found.append((out, qkv, *own))
    return found


def pages(lengths=LENGTHS) -> tuple[list[int], list[int]]:
    """The first, the second and the last sequence go on after a page; the first keeps its 14th and 15th
    frame, which are in two tiles of 16 rows, the third and the fourth their last two."""
    before, keep = [], []
    for index, length in enumerate(lengths):
        before += [{0: 3, 1: 0, 4: 5}.get(index, -1)] * length
        own = [-1] * length
        kept = {0: (13, 1), 2: (1, 2), 3: (48, 4)}.get(index)
        if kept is not None:
            own[kept[0] : kept[0] + 2] = [2 * kept[1], 2 * kept[1] + 1]
        keep += own
    return before, keep


@pytest.mark.parametrize(("block_rows", "inputs"), SOME_SIZES)
def test_sequences_that_begin(run, block_rows, inputs):
    torch.manual_seed(block_rows + inputs)
    found, expected = both(run, weights(inputs), block_rows)
    for ours, reference in zip(found, expected, strict=True):
        assert_close(ours, reference, torch.float16)


@pytest.mark.parametrize(("block_rows", "inputs"), SIZES)
def test_sequences_go_on_after_pages_and_keep_pages(run, block_rows, inputs):
    torch.manual_seed(block_rows + inputs)
    found, expected = both(run, weights(inputs), block_rows, LENGTHS, *pages())
    for ours, reference in zip(found, expected, strict=True):
        assert_close(ours, reference, torch.float16)
    assert torch.equal(found[2], expected[2])
    kept = torch.zeros(PAGES, STEPS, dtype=torch.bool)
    kept[[1, 2, 4], 1] = True
    assert torch.equal(found[3][~kept], expected[3][~kept])  # all else stays


# After each sequence of one or three frames, the next one begins at another of a tile's 14 lines.
SHORT = [(1,) * 14, (3,) * 14, (2, 2, 4, 1, 2, 2, 5, 2, 1, 1, 13)]


@pytest.mark.parametrize("lengths", SHORT, ids=["1", "3", "mixed"])
@pytest.mark.parametrize("paged", [False, True])
def test_tiles_have_many_short_sequences(run, lengths, paged):
    torch.manual_seed(sum(lengths))
    before, keep = None, None
    if paged:  # a half of the sequences goes on; sequences of two and more frames keep their last two, if any
        free = iter(range(3, PAGES))
        before, keep = [], []
        for index, length in enumerate(lengths):
            before += [index // 2 % 3 if index % 2 else -1] * length
            page = next(free, None) if length > 1 and index % 4 else None
            keep += [-1] * length if page is None else [-1] * (length - 2) + [2 * page, 2 * page + 1]
    found, expected = both(run, weights(256), 16, lengths, before, keep)
    for ours, reference in zip(found, expected, strict=True):
        assert_close(ours, reference, torch.float16)


def test_lines_are_rows_with_edges_before_each_sequence():
    edge = [-6, -7], [-10, -11]  # pages 1 and 3
    assert lines_of((2, 1), 9).tolist() == [UNUSED, UNUSED, -2, -3, 0, 1, -2, -3, 2]
    before = np.array([3, 3, -1, 1, 1, 1, -1])
    found = lines_of((2, 1, 3), 16, before).tolist()
    assert found == [UNUSED, UNUSED, *edge[1], 0, 1, -2, -3, 2, *edge[0], 3, 4, 5, UNUSED, UNUSED]
    with pytest.raises(ValueError, match="2 sequences of 3 rows do not fit into 8 lines"):
        lines_of((2, 1), 8)


@pytest.mark.parametrize(("block_rows", "most"), [(16, 98), (32, 210), (48, 322), (64, 434)])
def test_seven_tiles_have_room_for_all_but_the_edges_between_sequences(block_rows, most):
    count = line_count(most, block_rows)
    assert count == line_count(most - 5, block_rows) < line_count(most + 1, block_rows)
    assert has_room(count, (most,)) and not has_room(count, (most + 1,))
    assert has_room(count, (50, most - 52)) and not has_room(count, (50, most - 51))


def test_the_order_of_threads_does_not_matter(run):
    torch.manual_seed(2)
    layers = weights(256)
    found = []
    for seed in range(4):
        torch.manual_seed(3)
        found.append(both(run, layers, 16, (6, 14), [2] * 6 + [4] * 14, [-1] * 7 + [2, 3], seed=seed)[0])
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert torch.equal(first.nan_to_num(), other.nan_to_num())
