"""The kernels' input for a prefill: int32 lists, padded to a size for which there may be a CUDA graph, in a
single array so that they reach the device in one copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from light_tts.engine.llm.attention import RowSpan
from light_tts.kernels.llm.prefill_attention import QUERY_BLOCK, prefill_blocks

_ALIGNED = 4  # numbers in 16 bytes: kernels are compiled for this alignment of the lists
_KEPT = 256  # shapes whose places are remembered


@dataclass(frozen=True)
class PrefillShape:
    """Padded sizes of a batch; `words`: of the record of a request's state."""

    tokens: int
    spans: int
    words: int

    def sizes(self) -> dict[str, int]:
        """Length of each list, in the order of PrefillBatch."""
        of_spans = ("rows", "starts", "lengths", "offsets", "last", "draws")
        blocks = 2 * (self.tokens // QUERY_BLOCK + self.spans)
        return {
            **dict.fromkeys(("ids", "positions", "slots"), self.tokens),
            **dict.fromkeys(of_spans, self.spans),
            "blocks": blocks,
            "records": self.spans * self.words,
        }

    @lru_cache(maxsize=_KEPT)  # noqa: B019 (shapes are small and few)
    def places(self) -> dict[str, slice]:
        """Position of each list in the array. Must not be changed."""
        places, start = {}, 0
        for name, size in self.sizes().items():
            places[name] = slice(start, start + size)
            start += -(-size // _ALIGNED) * _ALIGNED
        return places

    def empty(self) -> np.ndarray:
        """Return the array of a batch that changes nothing."""
        places = self.places()
        flat = np.zeros(places["records"].stop, np.int32)
        for name in ("slots", "draws", "blocks"):
            flat[places[name]] = -1
        return flat

    def pack(
        self,
        ids: list[int],
        spans: list[RowSpan],
        complete: list[int],
        records: np.ndarray,
        slots_of: Callable[[int], np.ndarray],
    ) -> np.ndarray:
        """Return the filled array. ids: concatenated ids of all spans; complete: indices of the spans after
        which a token is sampled; records: their states; slots_of: returns the slots of all positions of a
        row."""
        flat, places = self.empty(), self.places()

        def fill(name: str, values: Any, offset: int = 0) -> None:
            start = places[name].start + offset
            flat[start : start + len(values)] = values

        offset, offsets = 0, []
        for span in spans:
            fill("positions", np.arange(span.start, span.end), offset)
            fill("slots", slots_of(span.row)[span.start : span.end], offset)
            offsets.append(offset)
            offset += span.length
        lengths = [span.length for span in spans]
        fill("ids", ids)
        fill("rows", [span.row for span in spans])
        fill("starts", [span.start for span in spans])
        fill("lengths", lengths)
        fill("offsets", offsets)
        fill("last", [offsets[i] + lengths[i] - 1 for i in complete])
        fill("draws", [spans[i].row for i in complete])
        fill("blocks", [number for block in prefill_blocks(lengths) for number in block])
        fill("records", records.ravel())
        return flat

    def unpack(self, flat: Tensor) -> PrefillBatch:
        """Return views of the array on the device."""
        lists: dict[str, Any] = {name: flat[place] for name, place in self.places().items()}
        lists["blocks"] = lists["blocks"].view(-1, 2)
        lists["records"] = lists["records"].view(self.spans, self.words)
        return PrefillBatch(**lists)


@dataclass(frozen=True)
class PrefillBatch:
    """Device arrays of int32: (tokens,) or (spans,); blocks: (programs, 2). `last`: index of the token after
    which row `draws` samples, -1 for none; records: (spans, words), the states of `draws` before that."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor
    last: Tensor
    draws: Tensor
    blocks: Tensor
    records: Tensor
