"""The buffers of one Euler step of a packed batch, and the tables that describe their layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from light_tts.kernels.flow.packed_attention import BLOCK_ENTRIES, CachedKeys
from light_tts.kernels.flow.packed_conv import CachedEdges
from light_tts.models.flow.unet.page_store import COPIES, PageStore

ALIGNMENT = 4  # int32 values: 16 bytes

Table = Tensor | np.ndarray


class Parts(NamedTuple):
    """The tables of a batch, all int32. step: (1,); position: (2 rows,), -1 for unused rows; blocks: see
    `attention_blocks`; tiles: see `resnet_block`, empty if residual blocks are not computed in one kernel;
    before, keep: (2 rows,), see CachedEdges; pages: see CachedKeys. The last three are empty if nothing is
    cached."""

    step: Any
    position: Any
    blocks: Any
    tiles: Any
    before: Any
    keep: Any
    pages: Any


@dataclass(frozen=True)
class Buffers:
    """The buffers of a step for a number of frames (rows), COPIES times.

    x: (rows, mels) float32, the state of the integration; inputs: (2 rows, estimator input).
    """

    x: Tensor
    inputs: Tensor
    hidden: tuple[Tensor, Tensor, Tensor]  # (2 rows, width)
    joined: Tensor  # (2 rows, 2 width): input of the up block, with the skip connection in the second half
    qkv: Tensor  # (2 rows, 3 inner)
    attended: Tensor  # (2 rows, inner)
    feed: Tensor  # (2 rows, 4 width)
    normal: Tensor | None  # (2 rows, width); None for few rows, see packed_linear
    next_qkv: Tensor | None  # (2 rows, 3 inner); None: a transformer block is computed in five kernels

    def first(self, rows: int, few: bool, joined: bool = False) -> Buffers:
        """Return the first part of these buffers, for fewer frames. `joined`: a transformer block is computed
        in one kernel; `few`: if it is not, without `normal`."""
        both = COPIES * rows
        return Buffers(
            x=self.x[:rows],
            inputs=self.inputs[:both],
            hidden=(self.hidden[0][:both], self.hidden[1][:both], self.hidden[2][:both]),
            joined=self.joined[:both],
            qkv=self.qkv[:both],
            attended=self.attended[:both],
            feed=self.feed[:both],
            normal=None if (few and not joined) or self.normal is None else self.normal[:both],
            next_qkv=self.next_qkv[:both] if joined and self.next_qkv is not None else None,
        )


class Rows:
    """Buffers and the device tables that describe their rows. The tables are views of one tensor, so that a
    single copy updates them."""

    def __init__(
        self,
        buffers: Buffers,
        blocks: int,
        block_rows: int,
        page_store: PageStore | None = None,
        pages: int = 0,
        tiles: int = 0,
        tile_rows: int | None = None,
    ) -> None:
        """`blocks`: maximum number of attention blocks, of `block_rows` queries each; `pages`: maximum number
        over all sequences; `page_store`: the cache, None: no caching; `tiles`: maximum number of tiles of
        residual blocks, `tile_rows`: see `resnet_block`, None: several kernels. All rows start unused."""
        self.buffers = buffers
        self.block_rows = block_rows
        self.tile_rows = tile_rows
        self.page_store = page_store
        both = COPIES * self.size
        per_row = 0 if page_store is None else both
        self._sizes = [1, both, BLOCK_ENTRIES * blocks, BLOCK_ENTRIES * tiles, per_row, per_row, pages]
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in self._sizes]
        self._starts = np.cumsum([0, *aligned]).tolist()
        self.table = torch.zeros(self._starts.pop(), dtype=torch.int32, device=buffers.x.device)
        parts = self.parts(self.table)
        self.step, self.position, self.blocks, self.tiles, self.before, self.keep, self.pages = parts
        self.clear()

    @property
    def size(self) -> int:
        return len(self.buffers.x)

    def parts(self, table: Table) -> Parts:
        """Return views of a table with this layout."""
        found = [table[start : start + size] for start, size in zip(self._starts, self._sizes, strict=True)]
        found[2], found[3] = found[2].reshape(-1, BLOCK_ENTRIES), found[3].reshape(-1, BLOCK_ENTRIES)
        return Parts(*found)

    def empty(self) -> np.ndarray:
        """Return a table on the host in which all rows are unused."""
        table = np.zeros(len(self.table), np.int32)
        parts = self.parts(table)
        for part in (parts.position, parts.before, parts.keep):
            part.fill(-1)
        return table

    def clear(self) -> None:
        """Mark all rows unused; reset to step 0."""
        self.table.zero_()
        for part in (self.position, self.before, self.keep):
            part.fill_(-1)


class PackedRun:
    """One evaluation over `rows`: hands each convolution and each attention layer, in order, its part of the
    cache; None if there is no cache."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._edges = iter(rows.page_store.edges if rows.page_store else ())
        self._layers = iter(rows.page_store.layers if rows.page_store else ())

    def edges(self) -> CachedEdges | None:
        rows, store = self.rows, next(self._edges, None)
        return None if store is None else CachedEdges(store, rows.before, rows.keep, rows.step)

    def keys(self) -> CachedKeys | None:
        store = next(self._layers, None)
        return None if store is None else CachedKeys(store, self.rows.pages, self.rows.step)
