"""Base class of the packed flow's encoders: makes the table that describes a batch of items padded to a
common length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from light_tts.models.checkpoint.config import MAX_FRAMES
from light_tts.models.flow.base import BaseFlow

Table = Tensor | np.ndarray


class EncoderParts(NamedTuple):
    """The tables of a batch, all int32. items: (items, 4), length and chunk (0: none) in tokens, then in
    frames; ids: (items * tokens,), the vocabulary size where there is none; tokens: (items * tokens,),
    position of each token in its item, -1 where there is none, and for those that are only context; frames:
    (items * ratio * tokens,), likewise; target: (items * ratio * tokens,), the row of the result for each
    frame, -1: none."""

    items: Any
    ids: Any
    tokens: Any
    frames: Any
    target: Any


@dataclass(frozen=True)
class EncoderItem:
    """ids: (n,), of prompt and speech; spoken: number of them that are not only context; the frames [start,
    ratio * spoken) are wanted."""

    ids: np.ndarray
    spoken: int
    streaming: bool
    start: int


class TableEncoder(ABC):
    """Computes features from ids. Thread-safe."""

    def __init__(self, flow: BaseFlow) -> None:
        self._vocabulary = flow.input_embedding.num_embeddings
        self._ratio, self._chunk = flow.ratio, flow.chunk_size
        self._places = np.arange(MAX_FRAMES, dtype=np.int32)

    @abstractmethod
    def shortened(self) -> TableEncoder:
        """Return an encoder that launches the same kernels, but fewer times, for rehearsals."""

    @abstractmethod
    def __call__(self, parts: EncoderParts, out: Tensor) -> None:
        """Write the features of the wanted frames to their rows of `out`, (rows, mels), may be strided."""

    def parts(self, table: Table, height: int, width: int) -> EncoderParts:
        """Return views of a table, on the host or device, for `height` items of `width` tokens."""
        end, tokens, frames = 4 * height, height * width, height * width * self._ratio
        found = [table[:end].reshape(height, 4)]
        for size in (tokens, tokens, frames, frames):
            found.append(table[end : end + size])
            end += size
        return EncoderParts(*found)

    def empty(self, height: int, width: int) -> np.ndarray:
        """Return a table without any item."""
        table = np.full(4 * height + 2 * (1 + self._ratio) * height * width, -1, np.int32)
        parts = self.parts(table, height, width)
        parts.items[:] = 0
        parts.ids[:] = self._vocabulary
        return table

    def table(self, items: Sequence[EncoderItem], first_row: int, height: int, width: int) -> np.ndarray:
        """Return the table of up to `height` items of up to `width` ids. The wanted frames of all items are
        consecutive rows of the result from `first_row` on."""
        table = self.empty(height, width)
        items_of, ids, tokens, frames, target = self.parts(table, height, width)
        for row, item in enumerate(items):
            end, chunk = self._ratio * item.spoken, self._chunk if item.streaming else 0
            items_of[row] = item.spoken, chunk, end, self._ratio * chunk
            token, frame = row * width, row * width * self._ratio
            np.maximum(item.ids, 0, out=ids[token : token + len(item.ids)])
            tokens[token : token + item.spoken] = self._places[: item.spoken]
            frames[frame : frame + end] = self._places[:end]
            next_row = first_row + end - item.start
            target[frame + item.start : frame + end] = np.arange(first_row, next_row)
            first_row = next_row
        return table
