"""Writes requests into the device's per-request state."""

from __future__ import annotations

import numpy as np

from light_tts.common.row_state import RowState
from light_tts.common.sampling import NO_TOKEN
from light_tts.common.transfer import upload
from light_tts.engine.llm.sequence import Sequence


def set_states(states: RowState, sequences: list[tuple[Sequence, int]], window: int) -> None:
    """Write the state of each (sequence, number of tokens in the pool) as it is before a sample is drawn,
    except `next_id`, which the sample sets: in one copy, because a request waits for it."""
    if not sequences:
        return
    places: list[int] = []
    words = []
    for sequence, cached in sequences:
        assert sequence.row is not None
        for name, values in _fields(sequence, cached, window).items():
            places += states.places(name, sequence.row)
            words.append(values.view(np.int32))
    table = upload(np.stack([places, np.concatenate(words)]), states.words.device)
    states.words.index_copy_(0, table[0], table[1].int())


def _fields(sequence: Sequence, cached: int, window: int) -> dict[str, np.ndarray]:
    """Return the values of a row's fields, each of the field's size."""
    rule = sequence.sampling
    numbers = {
        "position": cached,
        "step": len(sequence.outputs),
        "min_outputs": sequence.min_outputs,
        "top_k": rule.top_k,
        "win_size": rule.win_size,
        "repeats": rule.repeats,
        "bans": sequence.bans,
        "history": latest_outputs(sequence, window),
    }
    return {
        **{name: np.array(value, np.int32, ndmin=1) for name, value in numbers.items()},
        "seed": np.array([sequence.seed], np.int64),
        "part": np.array([sequence.part], np.int64),
        "top_p": np.array([rule.top_p], np.float32),
        "inverse_temperature": np.array([rule.inverse_temperature], np.float32),
    }


def latest_outputs(sequence: Sequence, window: int) -> list[int]:
    """Return the latest `window` outputs, newest last, padded with NO_TOKEN in front."""
    latest = sequence.latest(window)
    return [NO_TOKEN] * (window - len(latest)) + latest
