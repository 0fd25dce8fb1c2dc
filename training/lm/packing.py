"""Packs sequences of different lengths into rows of the same length, so that all batches have the same
shape.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from training.lm.layouts import NONE, Layout

ROW = 1024  # tokens
PLANES = 7  # of a batch: inputs, positions, sequence, speech, phoneme, begin and end of the spoken words
AHEAD = 8  # number of batches prepared in advance


def packed(layouts: list[Layout], rows: int) -> tuple[np.ndarray, list[Layout]]:
    """Pack the longest first, each into the first row with enough space. Returns (PLANES, rows, ROW) int32:
    inputs, positions, number of the sequence in its row (-1: none), speech and phoneme targets, and begin and
    end of the spoken words within the row; and the layouts that did not fit."""
    batch = np.zeros((PLANES, rows, ROW), np.int32)
    batch[2], batch[3:5] = -1, NONE
    used, left = [0] * rows, []
    for number, layout in enumerate(sorted(layouts, key=len, reverse=True)):
        size = len(layout)
        row = next((row for row, begin in enumerate(used) if begin + size <= ROW), None)
        if row is None:
            left.append(layout)
            continue
        place = batch[:, row, used[row] : used[row] + size]
        place[0], place[1], place[2] = layout.inputs, np.arange(size), number
        place[3], place[4] = layout.speech, layout.phoneme
        place[5:] = used[row] + layout.words.T
        used[row] += size
    return batch, left


def batches(layouts: Iterator[Layout], rows: int) -> Iterator[np.ndarray]:
    """Pack endless `layouts`; those that do not fit are put into the next batch."""
    waiting: list[Layout] = []
    while True:
        tokens = sum(map(len, waiting))
        while tokens < rows * ROW:
            waiting.append(next(layouts))
            tokens += len(waiting[-1])
        batch, waiting = packed(waiting, rows)
        yield batch


def prefetched(items: Iterator[np.ndarray]) -> Callable[[], np.ndarray]:
    """Return a function that returns the next item, prepared by a thread."""
    worker = ThreadPoolExecutor(1)
    coming = deque(worker.submit(next, items) for _ in range(AHEAD))

    def take() -> np.ndarray:
        coming.append(worker.submit(next, items))
        return coming.popleft().result()

    return take
