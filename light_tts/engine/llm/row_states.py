"""Writes requests into the device's per-request state."""

from __future__ import annotations

import numpy as np
import torch

from light_tts.common.row_state import RowState
from light_tts.common.sampling import NO_TOKEN
from light_tts.common.transfer import upload
from light_tts.engine.llm.sequence import Sequence

_NUMBERS = ("position", "step", "min_outputs", "seed", "part", "top_k", "win_size", "repeats")
_FRACTIONS = ("top_p", "inverse_temperature")


def set_states(states: RowState, sequences: list[tuple[Sequence, int]], window: int) -> None:
    """Write the state of each (sequence, number of tokens in the pool) as it is before a sample is drawn,
    except `next_id`, which the sample sets."""
    if not sequences:
        return
    table = [
        [s.row, *_numbers(s, cached), *_fractions(s), *s.bans, *latest_outputs(s, window)]
        for s, cached in sequences
    ]
    rows, *columns = upload(np.array(table, np.int64).T.copy(), states.seed.device)
    for name in _NUMBERS:
        field = getattr(states, name)
        field.index_copy_(0, rows, columns.pop(0).to(field.dtype))
    for name in _FRACTIONS:
        getattr(states, name).index_copy_(0, rows, columns.pop(0).to(torch.int32).view(torch.float32))
    first = len(columns) - window
    for field, part in ((states.bans, columns[:first]), (states.history, columns[first:])):
        field.index_copy_(0, rows, torch.stack(part, 1).to(field.dtype))


def _numbers(sequence: Sequence, cached: int) -> tuple[int, ...]:
    """Return the integers in the order of _NUMBERS."""
    rule = sequence.sampling
    limits = (sequence.min_outputs, sequence.seed, sequence.part)
    return (cached, len(sequence.outputs), *limits, rule.top_k, rule.win_size, rule.repeats)


def _fractions(sequence: Sequence) -> list[int]:
    """Return the fractions in the order of _FRACTIONS, as the bits of float32."""
    rule = sequence.sampling
    return np.array([rule.top_p, rule.inverse_temperature], np.float32).view(np.int32).tolist()


def latest_outputs(sequence: Sequence, window: int) -> list[int]:
    """Return the latest `window` outputs, newest last, padded with NO_TOKEN in front."""
    latest = sequence.latest(window)
    return [NO_TOKEN] * (window - len(latest)) + latest
