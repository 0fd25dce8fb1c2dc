"""The engine on the golden checkpoint: its output does not depend on how a sequence is run."""

import pytest
import torch
from support.llm_requests import ARRAYS, GOLDEN, TEXT, Loop, alone, bistream, request, speak

from light_tts.common.sampling import draw
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.sequence import PartRequest, SequenceError
from light_tts.tools.parity.llm import (
    SLOTS,
    bistream_sequence,
    finish,
    golden_ids,
    greedy_sequence,
    load_engine,
    load_model,
    run,
)


def test_requests_in_a_batch_say_what_they_say_alone():
    sequences = [request(i) for i in range(6)]
    Loop().run(sequences)
    assert [s.outputs for s in sequences] == [alone(i) for i in range(6)]


def test_prefill_in_pieces_changes_nothing():
    sequences = [request(i) for i in range(6)]
    loop = Loop(prefill_tokens=16)
    loop.run(sequences)
    assert max(sum(tokens for _, tokens in work) for work in loop.launched) == 16
    assert [s.outputs for s in sequences] == [alone(i) for i in range(6)]


def test_scores_of_a_prefill_in_pieces_are_those_of_one():
    scores = []
    for piece in (1000, 7):
        sequence = request(5)
        engine = load_engine(GOLDEN, lambda s, *_: scores.append(s) or s.argmax(-1))
        while not sequence.on_device:
            engine.launch([(sequence, min(piece, sequence.pending))])
    assert len(scores) == 2 and torch.allclose(*scores, atol=1e-4, rtol=0)


def test_paused_requests_go_on_with_the_same_tokens():
    sequences = [request(i) for i in range(6)]
    longest = max(len(s.inputs) + s.max_outputs for s in sequences)
    loop = Loop(slots=longest, busy_ratio=1.0, assumed_output=1)
    loop.run(sequences)
    assert loop.paused >= 3
    assert [s.outputs for s in sequences] == [alone(i) for i in range(6)]


def test_int8_cache_says_what_float_says():
    sequence = greedy_sequence(GOLDEN, "zs")
    assert finish(load_engine(GOLDEN, int8=True), sequence) == golden_ids(ARRAYS, "greedy_zs")


@pytest.mark.parametrize("name", ["zs", "noprompt"])
def test_int8_cache_changes_scores_so_little_that_only_near_ties_fall_otherwise(name):
    exact, rounded = (forced_scores(name, int8) for int8 in (False, True))
    error = (exact - rounded).abs()
    assert error.mean() < 0.01 * exact.std()  # a step of int8 is 1/127 of the largest value
    first, second = exact.topk(2).values.T
    sure = first - second > 2 * error.max()
    assert sure.float().mean() > 0.5
    assert torch.equal(exact.argmax(-1)[sure], rounded.argmax(-1)[sure])


def forced_scores(name: str, int8: bool) -> torch.Tensor:
    """Scores of all speech ids along the golden greedy tokens. -> (tokens, ids)"""
    tokens, rows = golden_ids(ARRAYS, f"greedy_{name}"), []

    def sampler(scores, *_):
        rows.append(scores[0, : GOLDEN.config.llm.speech_token_size])
        return torch.tensor([tokens[len(rows) - 1]])

    finish(load_engine(GOLDEN, sampler, int8=int8), greedy_sequence(GOLDEN, name, max_outputs=len(tokens)))
    return torch.stack(rows)


def test_a_resumed_request_goes_on_with_the_same_tokens():
    whole = alone(3)
    engine = load_engine(GOLDEN)
    for delivered in (0, 1, 19, 28, len(whole) - 1, len(whole)):
        assert finish(engine, request(3, forced=whole[:delivered])) == whole


def test_a_resumed_bistream_goes_on_with_the_same_tokens():
    pieces = [[text_id] for text_id in TEXT]
    whole = speak(bistream(), pieces)
    fill = load_model(GOLDEN).ids.fill
    assert whole.count(fill) >= 4
    first_fill = whole.index(fill)
    for delivered in (0, 1, first_fill, first_fill + 1, first_fill + 2, 30, 60, len(whole) - 1, len(whole)):
        assert speak(bistream(forced=whole[:delivered]), [TEXT]) == whole


def test_how_text_is_split_on_its_way_changes_nothing():
    one_by_one = speak(bistream(), [[text_id] for text_id in TEXT])
    assert speak(bistream(), [TEXT]) == one_by_one
    assert speak(bistream(), [TEXT[:1], [], TEXT[1:18], TEXT[18:]]) == one_by_one


def test_bistream_speaks_before_its_text_has_ended_and_waits_for_more():
    sequence, engine = bistream_sequence(GOLDEN, "noprompt"), load_engine(GOLDEN)
    sequence.append_text(TEXT[:1])
    while sequence.ready:
        run(engine, sequence)
    assert sequence.outputs[-1] == load_model(GOLDEN).ids.fill and not sequence.finished
    sequence.append_text(TEXT[1:2])  # 3 of the prompt text and these make 5
    assert sequence.ready


def test_ids_without_a_meaning_are_never_spoken():
    size = GOLDEN.config.llm.speech_token_size
    everything = speak(bistream(max_outputs=None), [TEXT])
    assert set(everything) <= {*range(size), size + 2}
    assert all(token < size for i in range(6) for token in alone(i))


def test_any_stop_id_ends_a_part_and_is_no_output():
    for stop in load_model(GOLDEN).ids.stop:
        sequence = request(1)
        sequence.accept(7)
        sequence.accept(stop)
        assert sequence.finished and sequence.outputs == [7]


def test_requests_that_can_never_fit_name_the_limit():
    with pytest.raises(SequenceError, match="max_req_total_len"):
        request(5, limit=90)
    with pytest.raises(SequenceError, match="max_req_total_len"):
        request(5, max_outputs=3)
    long = bistream(limit=60, max_outputs=None)
    long.append_text(TEXT)
    engine = load_engine(GOLDEN)
    finish(engine, long)
    assert long.finished and "max_req_total_len" in long.error
    assert len(long.inputs) <= 60


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, (2, 20)),
        ({"max_outputs": 9}, (2, 9)),
        ({"max_outputs": 1}, (1, 1)),
        ({"min_outputs": 30}, (30, 30)),
        ({"min_outputs": 0}, (0, 20)),
        ({"limit": 11}, (2, 8)),
    ],
)
def test_length_of_speech_follows_that_of_the_text_unless_given(given, limits):
    request = PartRequest("j/0", 0, 1, load_model(GOLDEN).ids, **{"limit": SLOTS, **given})
    part = OneShot(request, TEXT[:1])
    assert (part.min_outputs, part.max_outputs) == limits


def test_bistream_without_text_is_refused():
    with pytest.raises(SequenceError, match="empty"):
        bistream().finish_text()


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(SequenceError):
        request(2, forced=[GOLDEN.config.llm.speech_token_size])
    with pytest.raises(SequenceError):
        bistream().append_text([10**6])


def test_a_failed_step_leaves_everything_as_it_was():
    fail = [True]

    def fails_once(*args):
        if fail:
            fail.clear()
            raise RuntimeError("no luck")
        return draw(*args)

    engine = load_engine(GOLDEN, fails_once)
    sequence = request(4)
    with pytest.raises(RuntimeError):
        run(engine, sequence)
    assert sequence.cached == 0 and engine._table.free == SLOTS
    assert finish(engine, sequence) == alone(4)
