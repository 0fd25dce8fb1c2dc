"""The state of requests as the device gets it (see RowState)."""

from __future__ import annotations

import numpy as np

from light_tts.common.sampling import NO_TOKEN
from light_tts.engine.llm.sequence import Sequence


def state_records(record: np.dtype, sequences: list[tuple[Sequence, int]], window: int) -> np.ndarray:
    """Return the state of each (sequence, number of tokens in the pool) as it is before a sample is drawn.
    record: that of the RowState -> (sequences, words of a record) int32"""
    states = [_state(sequence, cached, window) for sequence, cached in sequences]
    records = np.array([tuple(state[name] for name in record.names or ()) for state in states], record)
    return records.view(np.int32).reshape(len(states), record.itemsize // 4)


def _state(sequence: Sequence, cached: int, window: int) -> dict[str, int | float | list[int]]:
    """Return the values of a record's fields."""
    rule = sequence.sampling
    return {
        "position": cached,
        "seed": sequence.seed,
        "part": sequence.part,
        "step": len(sequence.outputs),
        "min_outputs": sequence.min_outputs,
        "bans": sequence.bans,
        "history": latest_outputs(sequence, window),
        "top_p": rule.top_p,
        "top_k": rule.top_k,
        "win_size": rule.win_size,
        "repeats": rule.repeats,
        "inverse_temperature": rule.inverse_temperature,
    }


def latest_outputs(sequence: Sequence, window: int) -> list[int]:
    """Return the latest `window` outputs, newest last, padded with NO_TOKEN in front."""
    latest = sequence.latest(window)
    return [NO_TOKEN] * (window - len(latest)) + latest
