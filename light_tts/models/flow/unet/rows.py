"""What one Euler step of a packed batch computes with, and the tables that say what lies where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from light_tts.kernels.flow.packed_attention import BLOCK_ENTRIES, KeptKeys
from light_tts.kernels.flow.packed_conv import KeptEdges
from light_tts.models.flow.unet.kept import COPIES, Kept

ALIGNMENT = 4  # int32 values: 16 bytes

Table = Tensor | np.ndarray


class Parts(NamedTuple):
    """The tables of a batch, all int32. step: (1,); position: (2 rows,), -1 without meaning; blocks: see
    `attention_blocks`; before, keep: (2 rows,), see KeptEdges; pages: see KeptKeys. The last three are empty
    where nothing is kept."""

    step: Any
    position: Any
    blocks: Any
    before: Any
    keep: Any
    pages: Any


@dataclass(frozen=True)
class Buffers:
    """What a step computes with, for some number of frames (rows), COPIES times.

    x: (rows, mels) float32, the state of the integration; inputs: (2 rows, estimator input).
    """

    x: Tensor
    inputs: Tensor
    hidden: tuple[Tensor, Tensor, Tensor]  # (2 rows, width)
    joined: Tensor  # (2 rows, 2 width): what the up block reads, its skip in the second half
    qkv: Tensor  # (2 rows, 3 inner)
    attended: Tensor  # (2 rows, inner)
    feed: Tensor  # (2 rows, 4 width)
    normal: Tensor | None  # (2 rows, width); None: see packed_linear, few rows

    def first(self, rows: int, few: bool) -> Buffers:
        """The beginning of these, for fewer frames. `few`: without `normal`."""
        both = COPIES * rows
        return Buffers(
            x=self.x[:rows],
            inputs=self.inputs[:both],
            hidden=(self.hidden[0][:both], self.hidden[1][:both], self.hidden[2][:both]),
            joined=self.joined[:both],
            qkv=self.qkv[:both],
            attended=self.attended[:both],
            feed=self.feed[:both],
            normal=None if few or self.normal is None else self.normal[:both],
        )


class Rows:
    """Buffers, and tables on the device that say what is in their rows: parts of one tensor, so that one copy
    brings them up to date."""

    def __init__(
        self, buffers: Buffers, blocks: int, block_rows: int, kept: Kept | None = None, pages: int = 0
    ) -> None:
        """`blocks`: most of them, of `block_rows` queries each; `pages`: most of all sequences together;
        `kept`: None: nothing is. No row has a meaning yet."""
        self.buffers = buffers
        self.block_rows = block_rows
        self.kept = kept
        both = COPIES * self.size
        per_row = 0 if kept is None else both
        self._sizes = [1, both, BLOCK_ENTRIES * blocks, per_row, per_row, pages]
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in self._sizes]
        self._starts = np.cumsum([0, *aligned]).tolist()
        self.table = torch.zeros(self._starts.pop(), dtype=torch.int32, device=buffers.x.device)
        self.step, self.position, self.blocks, self.before, self.keep, self.pages = self.parts(self.table)
        self.clear()

    @property
    def size(self) -> int:
        return len(self.buffers.x)

    def parts(self, table: Table) -> Parts:
        """Views of a table of this layout."""
        found = [table[start : start + size] for start, size in zip(self._starts, self._sizes, strict=True)]
        found[2] = found[2].reshape(-1, BLOCK_ENTRIES)
        return Parts(*found)

    def empty(self) -> np.ndarray:
        """A table on the host in which no row has a meaning."""
        table = np.zeros(len(self.table), np.int32)
        parts = self.parts(table)
        for part in (parts.position, parts.before, parts.keep):
            part.fill(-1)
        return table

    def clear(self) -> None:
        """No row has a meaning; step 0."""
        self.table.zero_()
        for part in (self.position, self.before, self.keep):
            part.fill_(-1)


class Run:
    """One evaluation over `rows`: gives each convolution and each attention layer, in the order in which they
    come, what is kept for it; None where nothing is."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._edges = iter(rows.kept.edges if rows.kept else ())
        self._layers = iter(rows.kept.layers if rows.kept else ())

    def edges(self) -> KeptEdges | None:
        rows, store = self.rows, next(self._edges, None)
        return None if store is None else KeptEdges(store, rows.before, rows.keep, rows.step)

    def keys(self) -> KeptKeys | None:
        store = next(self._layers, None)
        return None if store is None else KeptKeys(store, self.rows.pages, self.rows.step)
