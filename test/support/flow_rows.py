"""Packed batches of random rows, for the tests of the flow's kernels."""

from __future__ import annotations

import torch

from light_tts.kernels.flow.packed_attention import Prefix

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
    """Equal within the tolerance in used rows; untouched (NaN in both) elsewhere."""
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.double().nan_to_num(), expected.double().nan_to_num()
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE[dtype], error


PAGE, PAGES, STEPS = 20, 9, 3
# The first sequence continues after two pages and stores its first 20 of 37 frames, the second continues
# after one, the third starts and stores three pages, the fourth has none.
PREFIXES = [Prefix(40, 0, 60), Prefix(20, 3, 20), Prefix(0, 4, 60), Prefix()]
PAGE_TABLE = [5, 2, 7, 2, 0, 8, 3]


def with_new_pages(store: torch.Tensor) -> torch.Tensor:
    """Return `store` with NaN where nothing has been stored."""
    store[[7, 0, 8, 3, 1]] = torch.nan
    return store
