"""The engine on the golden checkpoint: how a sequence is run never changes what it says."""

from pathlib import Path

import pytest
import torch
from parity_checks import Golden
from parity_checks.llm import (
    SLOTS,
    bistream_sequence,
    finish,
    golden_ids,
    greedy_sequence,
    load_engine,
    load_model,
)

from light_tts.common.sampling import RepetitionAwareSampler
from light_tts.server.tts_llm.scheduler import Limits, Scheduler
from light_tts.server.tts_llm.sequence import Bistream, OneShot, RequestError, Sequence

GOLDEN = Golden(Path(__file__).parent / "golden" / "cosyvoice2")
ARRAYS = GOLDEN.arrays("llm.npz")
TEXT = golden_ids(ARRAYS, "bi_text_ids")
PROMPT = golden_ids(ARRAYS, "prompt_speech_token")
SAMPLER = RepetitionAwareSampler(0.8, 25, 10, 0.1)


def request(i: int, forced: list[int] = (), **options) -> OneShot:
    """One of many different requests."""
    options = {"min_outputs": 20 + i, "max_outputs": 40 + 5 * i, "limit": SLOTS, **options}
    return OneShot(
        job=f"{i}/0",
        part=i % 2,
        seed=1000 + i,
        ids=load_model(GOLDEN).ids,
        prompt_text=TEXT[: i % 4],
        text=TEXT[i : 3 * i + 4],
        prompt_speech=PROMPT[: 13 * i],
        forced=list(forced),
        **options,
    )


def bistream(seed: int = 5, forced: list[int] = (), **options) -> Bistream:
    return Bistream(
        job="b/0",
        part=0,
        seed=seed,
        ids=load_model(GOLDEN).ids,
        **{"limit": SLOTS, "max_outputs": 100, **options},
        prompt_text=TEXT[:7],
        prompt_speech=PROMPT[:20],
        forced=list(forced),
        mix=(5, 15),
    )


def speak(sequence: Bistream, pieces: list[list[int]]) -> list[int]:
    """Outputs of a bistream sequence when each piece of text comes only after all that was possible."""
    engine = load_engine(GOLDEN, SAMPLER)
    for piece in pieces:
        sequence.append_text(piece)
        while sequence.ready:
            for _, token in engine.run([(sequence, sequence.pending)]):
                sequence.accept(token)
    sequence.finish_text()
    return finish(engine, sequence)


def alone(i: int) -> list[int]:
    return finish(load_engine(GOLDEN, SAMPLER), request(i))


def run_together(sequences: list[Sequence], slots: int = SLOTS, **limits) -> tuple[int, int]:
    """Run all through the scheduler -> how often one was paused, most tokens of a step."""
    limits = {"prefill_tokens": 512, "running": 8, "alive": 8, "steps_between_admissions": 4, **limits}
    limits = {"busy_ratio": 0.0, "assumed_output": 10, **limits}
    scheduler = Scheduler(Limits(slots=slots, **limits))
    engine = load_engine(GOLDEN, SAMPLER, slots=slots, max_len=min(slots, SLOTS))
    for sequence in sequences:
        scheduler.submit(sequence)
    paused = widest = 0
    while scheduler.has_work:
        scheduler.admit()
        plan = scheduler.plan()
        paused += len(plan.evicted)
        widest = max(widest, sum(tokens for _, tokens in plan.work))
        for sequence in plan.evicted:
            engine.release(sequence)
        for sequence, token in engine.run(plan.work):
            sequence.accept(token)
            if sequence.finished:
                scheduler.end(sequence)
                engine.release(sequence)
    assert engine._table.free == slots and engine._table.free_rows == 8
    return paused, widest


def test_requests_in_a_batch_say_what_they_say_alone():
    sequences = [request(i) for i in range(6)]
    run_together(sequences)
    assert [s.outputs for s in sequences] == [alone(i) for i in range(6)]


def test_prefill_in_pieces_changes_nothing():
    sequences = [request(i) for i in range(6)]
    _, widest = run_together(sequences, prefill_tokens=16)
    assert widest == 16
    assert [s.outputs for s in sequences] == [alone(i) for i in range(6)]


def test_scores_of_a_prefill_in_pieces_are_those_of_one():
    scores = []
    for piece in (1000, 7):
        sequence = request(5)
        engine = load_engine(GOLDEN, lambda s, *_: scores.append(s) or s.argmax(-1))
        while sequence.pending:
            engine.run([(sequence, min(piece, sequence.pending))])
    assert len(scores) == 2 and torch.allclose(*scores, atol=1e-4, rtol=0)


def test_paused_requests_go_on_with_the_same_tokens():
    sequences = [request(i) for i in range(6)]
    longest = max(len(s.inputs) + s.max_outputs for s in sequences)
    paused, _ = run_together(sequences, slots=longest, busy_ratio=1.0, assumed_output=1)
    assert paused > 3
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
    engine = load_engine(GOLDEN, SAMPLER)
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
    sequence, engine = bistream_sequence(GOLDEN, "noprompt"), load_engine(GOLDEN, SAMPLER)
    sequence.append_text(TEXT[:1])
    while sequence.ready:
        for _, token in engine.run([(sequence, sequence.pending)]):
            sequence.accept(token)
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
    with pytest.raises(RequestError, match="max_req_total_len"):
        request(5, limit=90)
    with pytest.raises(RequestError, match="max_req_total_len"):
        request(5, max_outputs=3)
    long = bistream(limit=60, max_outputs=None)
    long.append_text(TEXT)
    engine = load_engine(GOLDEN, SAMPLER)
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
    options = {"min_outputs": None, "max_outputs": None, "limit": SLOTS, **given}
    ids = load_model(GOLDEN).ids
    part = OneShot("j/0", 0, 1, ids, prompt_text=[], text=TEXT[:1], prompt_speech=[], forced=[], **options)
    assert (part.min_outputs, part.max_outputs) == limits


def test_bistream_without_text_is_refused():
    with pytest.raises(RequestError, match="empty"):
        bistream().finish_text()


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(RequestError):
        request(2, forced=[GOLDEN.config.llm.speech_token_size])
    with pytest.raises(RequestError):
        bistream().append_text([10**6])


def test_a_failed_step_leaves_everything_as_it_was():
    fail = [True]

    def sampler(*args):
        if fail:
            fail.clear()
            raise RuntimeError("no luck")
        return SAMPLER(*args)

    engine = load_engine(GOLDEN, sampler)
    sequence = request(4)
    with pytest.raises(RuntimeError):
        engine.run([(sequence, sequence.pending)])
    assert sequence.cached == 0 and engine._table.free == SLOTS
    assert finish(engine, sequence) == alone(4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("int8", [False, True])
def test_a_gpu_says_what_the_golden_values_say(int8):
    engine = load_engine(GOLDEN, device="cuda", int8=int8)
    assert finish(engine, greedy_sequence(GOLDEN, "zs")) == golden_ids(ARRAYS, "greedy_zs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_what_the_cpu_draws():
    assert finish(load_engine(GOLDEN, SAMPLER, device="cuda"), request(3)) == alone(3)
