"""What computes the flow, as the engine sees it: items in, mel spectrograms out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from light_tts.models.flow.memos import Memo


@dataclass(frozen=True)
class FlowItem:
    """prompt: (p,) int ids on the host; prompt_mel: (ratio * p or more, mels) and embedding: (size,) on the
    device; tokens: ids to speak. streaming: attention in chunks; finalize: False: the last `lookahead` tokens
    are only context. The memos of voice and stream: for a backend that keeps something of them; a stream's
    next item has the same ones, and its tokens begin with these."""

    prompt: np.ndarray
    prompt_mel: Tensor
    embedding: Tensor
    tokens: Sequence[int]
    streaming: bool
    finalize: bool
    voice_memo: Memo = field(default_factory=Memo)
    stream_memo: Memo = field(default_factory=Memo)


class FlowBackend(Protocol):
    """`packed`: a batch costs what its items cost, whatever their lengths and attention."""

    packed: bool

    def __call__(self, items: Sequence[FlowItem]) -> list[Tensor]:
        """The mel spectrogram of each item's tokens: (frames, mels) float32. Raises ValueError."""

    def warm_up(self, items: int) -> None:
        """Do what a first batch of up to `items` would have to wait for."""
