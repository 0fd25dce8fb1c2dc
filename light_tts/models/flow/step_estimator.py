"""The interface of a family's estimator for the packed flow."""

from __future__ import annotations

from typing import Protocol

import torch

from light_tts.models.flow.packed_rows import BuffersT, Rows
from light_tts.models.flow.page_store import PageLimits, PageStore


class StepEstimator(Protocol[BuffersT]):
    """Runs Euler steps of packed batches on a GPU. `steps`: their number; `dtype`: type of weights and
    activations."""

    steps: int
    mels: int
    dtype: torch.dtype
    device: torch.device

    def shortened(self) -> StepEstimator[BuffersT]:
        """Return an estimator that launches the same kernels, but fewer times, for rehearsals."""

    def step(self, rows: Rows[BuffersT]) -> None:
        """Run one Euler step: updates x, also in the inputs, and adds 1 to `rows.step`."""

    def keep(self, room: int, frames: int, limits: PageLimits) -> PageStore:
        """Return a memory of at most `room` bytes for pages of `frames` frames. Raises TooLittleMemory,
        torch.OutOfMemoryError and ValueError, see PageStore."""

    def rows_of_tile(self, rows: int) -> int | None:
        """Return the rows of a tile if transformer blocks of this number of rows (of both copies) are
        computed in one kernel; else None."""

    def rows_of_resnet_tile(self, rows: int) -> int | None:
        """Return the rows of a tile if residual blocks of this number of rows (of both copies) are computed
        in one kernel; else None."""

    def allocate(self, rows: int) -> BuffersT:
        """Return buffers for `rows` frames."""

    def part(self, buffers: BuffersT, rows: int) -> BuffersT:
        """Return the first part of these buffers, for `rows` frames."""
