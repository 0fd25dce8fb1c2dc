"""What a request writes into the device's state."""

import dataclasses

import torch

from light_tts.common.row_state import RowState
from light_tts.common.sampling import NO_TOKEN
from light_tts.common.sampling_rule import SamplingRule
from light_tts.engine.llm.row_states import state_records

FIELDS = [field.name for field in dataclasses.fields(RowState)][:-3]  # all but words, record, places
RULE = SamplingRule(top_p=0.3, top_k=7, win_size=4, tau_r=0.5)


@dataclasses.dataclass
class Request:
    """Has the attributes of a `Sequence` that `state_records` reads."""

    row: int
    outputs: list[int]
    bans: list[int]
    seed: int
    part: int = 1
    min_outputs: int = 20
    sampling: SamplingRule = RULE

    def latest(self, window: int) -> list[int]:
        return self.outputs[-window:]


def test_only_the_rows_of_the_requests_are_written():
    state = RowState.empty(4, window=5, special_ids=3, device=torch.device("cpu"))
    for name in FIELDS:
        getattr(state, name).fill_(9)
    seeds = (-(2**40) - 1, 2**62 + 3)
    requests = [Request(2, [4, 5], [0, 1, 2], seeds[0]), Request(0, list(range(8)), [2, 2, 0], seeds[1])]
    records = state_records(state.record, [(request, 30 + request.row) for request in requests], 5)
    rows = torch.tensor([2, 0, -1], dtype=torch.int32)
    state.write(rows, torch.nn.functional.pad(torch.from_numpy(records), (0, 0, 0, 1), value=7))
    assert state.next_id.tolist() == [9, 9, 9, 9]
    assert state.position.tolist() == [30, 9, 32, 9] and state.step.tolist() == [8, 9, 2, 9]
    assert state.seed.tolist() == [seeds[1], 9, seeds[0], 9] and state.part.tolist() == [1, 9, 1, 9]
    assert state.min_outputs.tolist() == [20, 9, 20, 9]
    assert state.bans.tolist() == [[2, 2, 0], [9] * 3, [0, 1, 2], [9] * 3]
    assert state.history.tolist() == [[3, 4, 5, 6, 7], [9] * 5, [NO_TOKEN] * 3 + [4, 5], [9] * 5]
    for name in ("top_p", "top_k", "win_size", "repeats", "inverse_temperature"):
        values = getattr(state, name)
        assert values.tolist() == torch.tensor([getattr(RULE, name), 9] * 2, dtype=values.dtype).tolist()


def test_no_request_has_no_record():
    record = RowState.empty(4, window=5, special_ids=3, device=torch.device("cpu")).record
    assert state_records(record, [], 5).shape == (0, record.itemsize // 4)


def test_fields_do_not_overlap():
    state = RowState.empty(3, window=5, special_ids=200, device=torch.device("cpu"))
    for number, name in enumerate(FIELDS):
        getattr(state, name).view(torch.int32).fill_(number)
    assert all((getattr(state, name).view(torch.int32) == n).all() for n, name in enumerate(FIELDS))
    first, distance = state.places.T.tolist()
    places = [a + row * b for a, b in zip(first, distance, strict=True) for row in range(3)]
    assert len(set(places)) == len(places) and min(places) >= 0 and max(places) < len(state.words)
    assert all(getattr(state, name).data_ptr() % 16 == state.words.data_ptr() % 16 for name in FIELDS)
