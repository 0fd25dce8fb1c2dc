"""The kernels' input for a prefill: int32 lists, padded to a size for which there may be a CUDA graph, in a
single array so that they reach the device in one copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from light_tts.engine.llm.attention import RowSpan
from light_tts.kernels.llm.prefill_attention import QUERY_BLOCK, prefill_blocks

_ALIGNED = 4  # numbers in 16 bytes: kernels are compiled for this alignment of the lists


@dataclass(frozen=True)
class PrefillShape:
    """Padded sizes of a batch."""

    tokens: int
    spans: int

    def sizes(self) -> dict[str, int]:
        """Length of each list, in the order of PrefillBatch."""
        of_spans = ("rows", "starts", "lengths", "offsets", "last", "draws")
        blocks = 2 * (self.tokens // QUERY_BLOCK + self.spans)
        return {
            **dict.fromkeys(("ids", "positions", "slots"), self.tokens),
            **dict.fromkeys(of_spans, self.spans),
            "blocks": blocks,
        }

    def places(self) -> dict[str, slice]:
        """Position of each list in the array."""
        places, start = {}, 0
        for name, size in self.sizes().items():
            places[name] = slice(start, start + size)
            start += -(-size // _ALIGNED) * _ALIGNED
        return places

    def empty(self) -> np.ndarray:
        """Return the array of a batch that changes nothing."""
        places = self.places()
        flat = np.zeros(max(place.stop for place in places.values()), np.int32)
        for name in ("slots", "draws", "blocks"):
            flat[places[name]] = -1
        return flat

    def pack(
        self, ids: list[int], spans: list[RowSpan], complete: list[int], slots_of: Callable[[int], np.ndarray]
    ) -> np.ndarray:
        """Return the filled array. ids: concatenated ids of all spans; complete: indices of the spans after
        which a token is sampled; slots_of: returns the slots of all positions of a row."""
        lengths = [span.length for span in spans]
        ends = np.cumsum(lengths)
        lists: dict[str, Any] = {
            "ids": ids,
            "positions": np.concatenate([np.arange(span.start, span.end) for span in spans]),
            "slots": np.concatenate([slots_of(span.row)[span.start : span.end] for span in spans]),
            "rows": [span.row for span in spans],
            "starts": [span.start for span in spans],
            "lengths": lengths,
            "offsets": ends - lengths,
            "last": ends[complete] - 1,
            "draws": [spans[i].row for i in complete],
            "blocks": np.ravel(prefill_blocks(lengths)),
        }
        flat, places = self.empty(), self.places()
        for name, values in lists.items():
            start = places[name].start
            flat[start : start + len(values)] = values
        return flat

    def unpack(self, flat: Tensor) -> PrefillBatch:
        """Return views of the array on the device."""
        lists: dict[str, Any] = {name: flat[place] for name, place in self.places().items()}
        lists["blocks"] = lists["blocks"].view(-1, 2)
        return PrefillBatch(**lists)


@dataclass(frozen=True)
class PrefillBatch:
    """Device arrays of int32: (tokens,) or (spans,); blocks: (programs, 2). `last`: index of the token after
    which row `draws` samples, -1 for none."""

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
