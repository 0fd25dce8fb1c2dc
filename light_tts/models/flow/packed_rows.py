"""The buffers of one Euler step of a packed batch, and the tables that describe their layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from light_tts.kernels.flow.fill_rows import FILL_ENTRIES
from light_tts.kernels.flow.packed_attention import (
    BLOCK_ENTRIES,
    ROW_ENTRIES,
    CachedKeys,
    Prefix,
    attention_blocks,
    attention_of_rows,
)
from light_tts.kernels.flow.packed_conv import CachedEdges
from light_tts.kernels.flow.resnet_block import line_count
from light_tts.models.flow.page_store import COPIES, PageStore

ALIGNMENT = 8  # int32 values: 32 bytes

Table = Tensor | np.ndarray


class Parts(NamedTuple):
    """The tables of a batch, all int32. step: (1,); position: (2 rows,), -1 for unused rows; fill: see
    `fill_rows`; blocks: see `attention_blocks`, empty if transformer blocks are computed in one kernel;
    queries: see `attention_of_rows`, empty if they are not; lines: see `resnet_block`, empty if residual
    blocks are not computed in one kernel; before, keep: (2 rows,), see CachedEdges; pages: see CachedKeys.
    The last three are empty if nothing is cached."""

    step: Any
    position: Any
    fill: Any
    blocks: Any
    queries: Any
    lines: Any
    before: Any
    keep: Any
    pages: Any


class Buffers(Protocol):
    """The buffers of a step for a number of frames (rows), COPIES times. Those of each estimator have more
    for its own use.

    x: (rows, mels) float32, the state of the integration; inputs: (2 rows, 4 mels), see `fill_rows`.
    """

    @property
    def x(self) -> Tensor: ...

    @property
    def inputs(self) -> Tensor: ...


BuffersT = TypeVar("BuffersT", bound=Buffers)


class Rows(Generic[BuffersT]):
    """Buffers and the device tables that describe their rows. The tables are views of one tensor, so that a
    single copy updates them."""

    def __init__(
        self,
        buffers: BuffersT,
        blocks: int,
        block_rows: int,
        page_store: PageStore | None = None,
        pages: int = 0,
        tile_rows: int | None = None,
    ) -> None:
        """`blocks`: maximum number of attention blocks, 0 if transformer blocks are computed in one kernel;
        `block_rows`: queries of such a block, or rows of a tile of that kernel; `pages`: maximum number
        over all sequences; `page_store`: the cache, None: no caching; `tile_rows`: of residual blocks, see
        `resnet_block`, None: several kernels. All rows start unused."""
        self.buffers = buffers
        self.block_rows = block_rows
        self.tile_rows = tile_rows
        self.page_store = page_store
        both = COPIES * self.size
        per_row = 0 if page_store is None else both
        queries = 0 if blocks else -(-self.size // block_rows) * block_rows
        attention = [BLOCK_ENTRIES * blocks, ROW_ENTRIES * queries]
        lines = 0 if tile_rows is None else line_count(self.size, tile_rows)
        self._sizes = [1, both, FILL_ENTRIES * self.size, *attention, lines, per_row, per_row, pages]
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in self._sizes]
        self._starts = np.cumsum([0, *aligned]).tolist()
        self.table = torch.zeros(self._starts.pop(), dtype=torch.int32, device=buffers.x.device)
        parts = self.parts(self.table)
        self.step, self.position, self.fill, self.blocks, self.queries, self.lines, *cached = parts
        self.before, self.keep, self.pages = cached
        self.clear()

    @property
    def size(self) -> int:
        return len(self.buffers.x)

    def parts(self, table: Table) -> Parts:
        """Return views of a table with this layout."""
        found = [table[start : start + size] for start, size in zip(self._starts, self._sizes, strict=True)]
        for index, shape in ((2, (FILL_ENTRIES, -1)), (3, (-1, BLOCK_ENTRIES)), (4, (-1, ROW_ENTRIES))):
            found[index] = found[index].reshape(*shape)
        return Parts(*found)

    def empty(self) -> np.ndarray:
        """Return a table on the host in which all rows are unused."""
        table = np.zeros(len(self.table), np.int32)
        parts = self.parts(table)
        for part in (parts.position, parts.fill, parts.lines, parts.before, parts.keep):
            part.fill(-1)
        return table

    def place_attention(
        self,
        parts: Parts,
        lengths: Sequence[int],
        chunks: Sequence[int],
        prefixes: Sequence[Prefix] | None = None,
    ) -> None:
        """Write into `parts` of a table on the host what the rows of these sequences see (see
        `attention_blocks`)."""
        if len(parts.queries):
            known = None if prefixes is None else tuple(prefixes)
            parts.queries[:] = _seen(tuple(lengths), tuple(chunks), len(parts.queries), known)
        else:
            count = len(parts.blocks)
            parts.blocks[:] = attention_blocks(lengths, chunks, self.block_rows, count, prefixes)

    def clear(self) -> None:
        """Mark all rows unused; reset to step 0."""
        self.table.zero_()
        for part in (self.position, self.fill, self.lines, self.before, self.keep):
            part.fill_(-1)


@lru_cache(maxsize=256)
def _seen(
    lengths: tuple[int, ...], chunks: tuple[int, ...], count: int, prefixes: tuple[Prefix, ...] | None
) -> np.ndarray:
    """Return the result of `attention_of_rows`, which must not be changed; many batches have the same."""
    return attention_of_rows(lengths, chunks, count, prefixes)


class PackedRun(Generic[BuffersT]):
    """One evaluation over `rows`: hands each convolution and each attention layer, in order, its part of the
    cache; None if there is no cache."""

    def __init__(self, rows: Rows[BuffersT]) -> None:
        self.rows = rows
        self._edges = iter(rows.page_store.edges if rows.page_store else ())
        self._layers = iter(rows.page_store.layers if rows.page_store else ())

    def edges(self) -> CachedEdges | None:
        rows, store = self.rows, next(self._edges, None)
        return None if store is None else CachedEdges(store, rows.before, rows.keep, rows.step)

    def keys(self) -> CachedKeys | None:
        store = next(self._layers, None)
        return None if store is None else CachedKeys(store, self.rows.pages, self.rows.step)
