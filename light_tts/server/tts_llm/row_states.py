"""Putting requests into the state that the device keeps of each."""

from __future__ import annotations

import numpy as np
import torch

from light_tts.common.row_state import RowState
from light_tts.common.sampling import NO_TOKEN
from light_tts.common.transfer import upload
from light_tts.server.tts_llm.sequence import Sequence

_NUMBERS = ("position", "step", "min_outputs", "seed", "part")


def set_states(states: RowState, sequences: list[tuple[Sequence, int]], window: int) -> None:
    """Put in the state of each (sequence, tokens in the pool) as it is before a draw. `next_id` is what that
    draw sets."""
    if not sequences:
        return
    table = [
        [s.row, cached, len(s.outputs), s.min_outputs, s.seed, s.part, *s.banned, *_latest(s, window)]
        for s, cached in sequences
    ]
    rows, *columns = upload(np.array(table, np.int64).T.copy(), states.seed.device)
    for name, values in zip(_NUMBERS, columns, strict=False):
        field = getattr(states, name)
        field.index_copy_(0, rows, values.to(field.dtype))
    first, last = len(_NUMBERS), len(columns) - window
    for field, part in ((states.banned, columns[first:last]), (states.history, columns[last:])):
        field.index_copy_(0, rows, torch.stack(part, 1).to(field.dtype))


def _latest(sequence: Sequence, window: int) -> list[int]:
    latest = sequence.latest(window)
    return [NO_TOKEN] * (window - len(latest)) + latest
