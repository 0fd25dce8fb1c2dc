"""The part of the engine that turns mel frames into samples and passes state from chunk to chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from light_tts.engine.speech.work_item import WorkItem


class Vocoding(Protocol):
    """`held_back`: samples at the end of a chunk that are delivered with the next one; `replayed`: number of
    chunks to speak again in order to continue after them, None: all chunks of the part."""

    held_back: int
    replayed: int | None

    def speak(self, items: Sequence[WorkItem], mels: Sequence[Tensor]) -> list[np.ndarray]:
        """Return the new samples of each item, float32. mels: its new frames, (mel channels, frames) float32
        on the device; without frames an item has the samples that were held back. States are updated only if
        everything succeeds."""
