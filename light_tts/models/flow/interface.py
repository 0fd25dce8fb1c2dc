"""The engine's interface to the flow: items in, mel spectrograms out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache
from light_tts.models.flow.memos import Memo


@dataclass(frozen=True)
class FlowItem:
    """prompt: (p,) int ids on the host; prompt_mel: (ratio * p or more, mels) and embedding: (size,) on the
    device; tokens: ids to speak. streaming: attention in chunks; finalize: False: the last `lookahead` tokens
    are only context. The memos of voice and stream hold state that a backend caches; the next item of a
    stream has the same ones, and its tokens extend these."""

    prompt: np.ndarray
    prompt_mel: Tensor
    embedding: Tensor
    tokens: Sequence[int]
    streaming: bool
    finalize: bool
    voice_memo: Memo = field(default_factory=Memo)
    stream_memo: Memo = field(default_factory=Memo)


class FlowBackend(Protocol):
    """`packed`: the cost of a batch is the sum of its items' costs, whatever their lengths and attention."""

    packed: bool

    @property
    def graphs(self) -> GraphCache | None:
        """None if nothing is recorded."""

    def __call__(self, items: Sequence[FlowItem]) -> list[Tensor]:
        """Return the mel spectrogram of each item's tokens: (frames, mels) float32. Raises ValueError."""

    def cached_frames(self, voice: Memo, stream: Memo) -> int:
        """Return how many frames of a streamed item with these memos need not be computed again, as far as
        batches are sized by it: 0 if `packed` is false."""

    def warm_up(self, items: int, first: bool = True) -> None:
        """Do in advance what a first chunk would have to wait for; `graphs` has the rest that batches of up
        to `items` need. `first`: this is the first of the instances that share weights."""
