import numpy as np
import pytest

from light_tts.engine.speech.chunk_planner import ChunkPlanner

GOLDEN = "test/golden/cosyvoice2/token2wav.npz"


def plan(planner: ChunkPlanner, total: int) -> list[tuple[int, int, int, bool]]:
    chunks = []
    while chunk := planner.next_chunk(total, finished=True):
        chunks.append((chunk.start, chunk.end, chunk.context_end, chunk.final))
    return chunks


@pytest.mark.parametrize(("schedule", "max_hop"), [("fixed_hop_meta", 25), ("grow_hop_meta", 100)])
def test_chunks_are_those_of_the_golden_schedules(schedule, max_hop):
    meta = np.load(GOLDEN)[schedule]
    chunks = plan(ChunkPlanner(prompt_tokens=98, hop=25, lookahead=3, max_hop=max_hop), total=120)
    assert [(start, given, final) for start, _, given, final in chunks] == [
        (offset, given, bool(final)) for offset, given, final, _ in meta
    ]


@pytest.mark.parametrize("prompt", [0, 1, 24, 25, 26, 98])
@pytest.mark.parametrize("max_hop", [25, 100])
@pytest.mark.parametrize("total", [0, 1, 27, 28, 29, 53, 200, 333])
def test_chunks_do_not_depend_on_when_tokens_arrive(prompt, max_hop, total):
    at_once = plan(ChunkPlanner(prompt, 25, 3, max_hop), total)
    one_by_one, planner = [], ChunkPlanner(prompt, 25, 3, max_hop)
    for available in range(total + 1):
        while chunk := planner.next_chunk(available, finished=available == total):
            one_by_one.append((chunk.start, chunk.end, chunk.context_end, chunk.final))
    assert one_by_one == at_once
    assert [start for start, *_ in at_once] == [0, *(end for _, end, *_ in at_once[:-1])]
    assert at_once[-1][1] == total and at_once[-1][3]


def test_no_chunk_before_its_lookahead_has_arrived():
    planner = ChunkPlanner(prompt_tokens=98, hop=25, lookahead=3)
    assert planner.needed == 30
    assert planner.next_chunk(29, finished=False) is None
    assert planner.next_chunk(30, finished=False).end == 27


@pytest.mark.parametrize("prompt", [0, 25, 87, 98])
@pytest.mark.parametrize("max_hop", [25, 100])
@pytest.mark.parametrize("first_hop", [5, 12, 20])
def test_a_short_first_chunk_adds_one_border_and_moves_none(prompt, max_hop, first_hop):
    usual = plan(ChunkPlanner(prompt, 25, 3, max_hop), 333)
    planner = ChunkPlanner(prompt, 25, 3, max_hop, first_hop)
    assert planner.needed == first_hop + 3
    first, second, *others = plan(planner, 333)
    assert first == (0, first_hop, first_hop + 3, False)
    assert second == (first_hop, *usual[0][1:])
    assert others == usual[1:]
