"""Which chunk is spoken next, as explicit tables; and which chunks of a part remain."""

import dataclasses

import numpy as np
import pytest

from light_tts.engine.speech.part_speech import ChunkRules, Delivered, PartSpeech, PartTooLong
from light_tts.engine.speech.policy import DeadlinePolicy, Waiting

RATE = 24000
FILL = 729
RULES = {
    name: ChunkRules(
        hop=25,
        max_hop=max_hop,
        lookahead=3,
        vocabulary=FILL,
        max_tokens=7500,
        samples_per_token=960,
        held_back=3840,
        replayed=2,
    )
    for name, max_hop in (("fixed", 25), ("grow", 100))
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def waiting(job: str, since: float = 0.0, stream=True, masked=True, frames=100) -> Waiting:
    return Waiting(job, since, stream, masked, frames)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policy(clock) -> DeadlinePolicy:
    return DeadlinePolicy(RATE, clock)


def names(chunks: list[Waiting]) -> list[str]:
    return [chunk.job for chunk in chunks]


def test_first_chunks_come_first_in_the_order_of_their_arrival(policy, clock):
    clock.now = 9.0
    policy.delivered("playing", RATE)
    chunks = [waiting("playing", 1.0), waiting("second", 8.0), waiting("first", 7.0)]
    assert names(policy.order(chunks)) == ["first", "second", "playing"]


def keep_busy(policy: DeadlinePolicy, streams: int) -> None:
    """Start streams that wait for text; each chunk is a second of audio."""
    for number in range(streams):
        policy.delivered(f"other {number}", RATE)


def test_no_stream_begins_where_one_that_has_begun_might_run_dry(policy, clock):
    keep_busy(policy, 20)
    policy.delivered("dry soon", RATE)  # dry at 1
    policy.delivered("playing", 3 * RATE)  # dry at 3
    chunks = [waiting("new"), waiting("playing"), waiting("dry soon")]
    for _ in range(50):
        policy.took(0.05, 1)  # so 0.55 s are kept before the next is dry, 0.6 before the one after it
    clock.now = 0.4
    assert names(policy.order(chunks)) == ["new", "dry soon", "playing"]
    assert policy.first_is_next(chunks, []) and policy.first_is_next([], chunks)
    clock.now = 0.5
    assert names(policy.order(chunks)) == ["dry soon", "playing", "new"]
    assert not policy.first_is_next(chunks, [])
    policy.delivered("dry soon", RATE)
    assert names(policy.order(chunks)) == ["new", "dry soon", "playing"]


@pytest.mark.parametrize(("others", "first"), [(7, "new"), (9, "playing")])
def test_less_is_spared_while_less_than_half_of_the_time_is_needed(policy, clock, others, first):
    keep_busy(policy, others)
    policy.delivered("playing", RATE)  # dry at 1
    for _ in range(100):
        policy.took(0.05, 1)
    clock.now = 0.8  # 4 batches before: enough for two, not for ten
    assert names(policy.order([waiting("new"), waiting("playing")]))[0] == first
    clock.now = 0.9
    assert names(policy.order([waiting("new"), waiting("playing")]))[0] == "playing"


def test_streams_that_wait_for_chunks_need_them_one_after_the_other(policy):
    keep_busy(policy, 10)
    for _ in range(50):
        policy.took(0.08, 1)  # 0.8 s are kept, and one chunk's time for each that waits
    for stream in range(3):
        policy.delivered(str(stream), RATE)  # dry at 1
    chunks = [waiting("new"), waiting("0"), waiting("1")]
    assert names(policy.order(chunks)) == ["new", "0", "1"]
    assert names(policy.order([*chunks, waiting("2")])) == ["0", "1", "2", "new"]


def test_a_stream_whose_chunk_is_not_there_keeps_nobody_from_beginning(policy, clock):
    policy.took(0.1, 1)
    policy.delivered("its text is yet to come", RATE)
    policy.delivered("playing", 9 * RATE)
    clock.now = 5.0
    assert names(policy.order([waiting("playing"), waiting("new")])) == ["new", "playing"]


def test_answers_in_one_piece_do_not_wait_for_ever_for_new_streams(policy, clock):
    chunks = [waiting("whole", 0.0, stream=False), waiting("new", 4.0)]
    clock.now = 4.0
    assert names(policy.order(chunks)) == ["new", "whole"]
    clock.now = 5.1
    assert names(policy.order(chunks)) == ["whole", "new"]


def test_a_short_answer_in_one_piece_passes_a_long_one(policy, clock):
    clock.now = 4.0
    later = Waiting("long", 2.0, stream=False, masked=False, frames=900, part=3)
    assert names(policy.order([later, waiting("short", 4.0, stream=False)])) == ["short", "long"]
    assert names(policy.order([later, waiting("short", 5.5, stream=False)])) == ["long", "short"]
    clock.now = 7.1
    assert names(policy.order([later, waiting("short", 4.0, stream=False)])) == ["long", "short"]


def test_then_the_client_that_runs_dry_soonest(policy, clock):
    policy.delivered("long", 3 * RATE)  # dry at 3
    clock.now = 1.0
    policy.delivered("short", RATE)  # dry at 2
    assert names(policy.order([waiting("long"), waiting("short", 1.0)])) == ["short", "long"]
    policy.delivered("short", 2 * RATE)  # dry at 4
    assert names(policy.order([waiting("short", 0.0), waiting("long", 1.0)])) == ["long", "short"]


def test_a_client_that_was_dry_plays_from_the_next_delivery_on(policy, clock):
    policy.delivered("dry", RATE)  # dry at 1
    clock.now = 5.0
    policy.delivered("dry", RATE)  # dry at 6, not at 2
    policy.delivered("other", RATE // 2)  # dry at 5.5
    assert names(policy.order([waiting("dry"), waiting("other")])) == ["other", "dry"]


def test_an_answer_in_one_piece_is_due_since_it_was_ready(policy, clock):
    clock.now = 2.0
    policy.delivered("playing", RATE)  # dry at 3
    assert names(policy.order([waiting("playing"), waiting("whole", 2.9, stream=False)])) == [
        "whole",
        "playing",
    ]
    assert names(policy.order([waiting("playing"), waiting("whole", 3.1, stream=False)])) == [
        "playing",
        "whole",
    ]


def test_a_resumed_job_is_taken_for_dry(policy, clock):
    policy.delivered("playing", 5 * RATE)
    policy.resumed("resumed")
    chunks = [waiting("playing"), waiting("resumed"), waiting("new", 1.0)]
    assert names(policy.order(chunks)) == ["new", "resumed", "playing"]


def test_a_forgotten_job_is_new_again(policy):
    policy.delivered("job", RATE)
    policy.forget("job")
    policy.forget("job")
    policy.delivered("other", 0)
    assert names(policy.order([waiting("other"), waiting("job", 1.0)])) == ["job", "other"]


@pytest.mark.parametrize(
    ("frames", "masked", "limit", "expected"),
    [
        ([100, 100, 100, 100], "1111", 3, [0, 1, 2]),
        ([100, 90, 110], "1111", 8, [0, 1, 2]),
        ([100, 1000, 110], "1111", 8, [0, 2]),  # a long one would multiply the others' work
        ([100, 100, 100], "1010", 8, [0, 2]),  # another attention
        ([100], "1", 1, [0]),
        ([], "", 4, []),
    ],
)
def test_a_batch_is_the_most_urgent_chunks_of_like_length_and_attention(
    policy, frames, masked, limit, expected
):
    chunks = [
        waiting(str(index), index, masked=masked[index] == "1", frames=frames[index])
        for index in range(len(frames))
    ]
    assert names(policy.next_batch(chunks[::-1], limit)) == [str(index) for index in expected]


# ---------------------------------------------------------------- chunks of a part


def speak(speech: PartSpeech) -> list[tuple]:
    """Return everything that can be spoken now: (start, end, tokens, first sample, skip)."""
    steps = []
    while (step := speech.step) is not None:
        steps.append((step.chunk.start, step.chunk.end, step.tokens, step.start, step.skip))
        speech.advance()
    return steps


@pytest.mark.parametrize("schedule", ["fixed", "grow"])
@pytest.mark.parametrize("prompt", [0, 98])
@pytest.mark.parametrize("most_replayed", [2, None])
def test_audio_and_tokens_follow_without_gap_wherever_the_client_had_got_to(schedule, prompt, most_replayed):
    rules = dataclasses.replace(RULES[schedule], replayed=most_replayed)
    outputs = [FILL if index % 16 == 15 else index % FILL for index in range(300)]
    whole = PartSpeech(rules, prompt, stream=True)
    whole.add(outputs, final=True)
    undisturbed = speak(whole)
    assert whole.done
    assert [token for _, _, tokens, _, _ in undisturbed for token in tokens] == outputs
    assert [skip for *_, skip in undisturbed] == [0] * len(undisturbed)
    heard, samples = [], 0
    for count, (_, end, tokens, start, _) in enumerate(undisturbed[:-1], start=1):
        assert start == samples
        heard, samples = heard + tokens, end * 960 - 3840
        rest = PartSpeech(rules, prompt, True, Delivered(tokens=heard, samples=samples))
        rest.add(heard, final=False)
        rest.add(outputs[len(heard) :], final=True)
        replayed = count if most_replayed is None else min(most_replayed, count)
        steps = speak(rest)
        assert [(tokens, skip) for _, _, tokens, _, skip in steps[:replayed]] == [([], None)] * replayed
        assert [step[:2] for step in steps[:replayed]] == [
            step[:2] for step in undisturbed[count - replayed : count]
        ]
        assert steps[replayed:] == undisturbed[count:]


def test_a_chunk_the_client_has_half_of_goes_on_in_the_middle():
    speech = PartSpeech(RULES["fixed"], 0, True, Delivered(tokens=list(range(25)), samples=20160 + 100))
    speech.add(range(60), final=True)
    assert speak(speech) == [
        (0, 25, [], 0, None),
        (25, 50, list(range(25, 50)), 20260, 100),
        (50, 60, list(range(50, 60)), 44160, 0),
    ]


def test_an_answer_in_one_piece_waits_for_the_last_token():
    speech = PartSpeech(RULES["fixed"], 98, stream=False)
    speech.add(range(100), final=False)
    assert speech.step is None
    speech.add([], final=True)
    assert speak(speech) == [(0, 100, list(range(100)), 0, 0)]
    assert speech.done


def test_ids_that_are_no_speech_never_reach_the_flow():
    speech = PartSpeech(RULES["fixed"], 0, stream=False)
    speech.add([1, FILL, 2, FILL + 1, -1, 10**9, 3], final=True)
    assert speech.ids == [1, 2, 3]
    assert speech.step.tokens == [1, FILL, 2, FILL + 1, -1, 10**9, 3]


def test_a_part_without_tokens_is_one_empty_chunk():
    speech = PartSpeech(RULES["fixed"], 98, stream=True)
    speech.add([], final=True)
    assert speak(speech) == [(0, 0, [], 0, 0)]


def test_a_part_longer_than_the_flow_can_take_names_the_limit():
    speech = PartSpeech(RULES["fixed"], 98, stream=False)
    speech.add(np.zeros(7402, int).tolist(), final=False)
    with pytest.raises(PartTooLong, match="limit of 7500 speech tokens"):
        speech.add([0], final=False)


def test_a_packed_batch_takes_any_lengths_and_masks_up_to_its_size(clock):
    policy = DeadlinePolicy(RATE, clock, packed=True)
    chunks = [
        waiting(str(i), float(i), stream=False, masked=i % 2 == 0, frames=50 + 4000 * i) for i in range(3)
    ]
    assert names(policy.next_batch(chunks, 3)) == ["0", "1"]  # 50 + 4050 + 8050 frames are too many


def test_a_packed_batch_with_a_first_chunk_is_short(clock):
    policy = DeadlinePolicy(RATE, clock, packed=True)
    policy.delivered("playing", RATE)
    policy.delivered("other", RATE)
    chunks = [waiting("playing", frames=200), waiting("other", frames=50)]
    firsts = [waiting(f"first {i}", float(i), frames=100) for i in range(3)]
    assert names(policy.next_batch(chunks, 8)) == ["playing", "other"]
    assert names(policy.next_batch([*chunks, *firsts], 8)) == ["first 0", "first 1", "first 2"]
    assert names(policy.next_batch([*chunks, firsts[0]], 8)) == ["first 0", "other"]
    many = [waiting(f"later {i}", frames=100) for i in range(20)]
    for chunk in many:
        policy.delivered(chunk.job, 9 * RATE)
    assert len(policy.next_batch([*many, firsts[0]], 16)) == 5  # 2100 / 4 frames


def test_the_urgent_lane_takes_short_batches_of_later_chunks(clock):
    policy = DeadlinePolicy(RATE, clock, packed=True)
    for i in range(4):
        policy.delivered(str(i), RATE * (i + 1))
    chunks = [waiting(str(i), frames=900) for i in range(4)]
    assert names(policy.next_batch(chunks, 8, short=True)) == ["0", "1"]  # half
    assert names(policy.next_batch(chunks, 8)) == ["0", "1", "2", "3"]
    few = [waiting(str(i), frames=100) for i in range(4)]
    assert names(policy.next_batch(few, 8, short=True)) == ["0", "1"]  # 256 frames at most


# ---------------------------------------------------------------- beside first chunks


@pytest.fixture
def gpu(clock) -> DeadlinePolicy:
    """A device on which concurrent batches slow each other down; the client of "playing" has audio
    until 2.
    """
    policy = DeadlinePolicy(RATE, clock, packed=True, firsts_alone=True)
    policy.delivered("playing", 2 * RATE)
    return policy


def test_what_is_in_no_hurry_waits_for_the_end_of_a_first_chunk(gpu, clock):
    first, later, whole = waiting("first"), waiting("playing"), waiting("whole", 0.0, stream=False)
    assert gpu.is_first(first) and not gpu.is_first(later) and not gpu.is_first(whole)
    assert gpu.next_batch([later, whole], 8, in_work=[first]) == []
    assert names(gpu.next_batch([later, whole], 8)) == ["whole", "playing"]
    gpu.delivered("first", RATE)
    assert names(gpu.next_batch([later, whole], 8, in_work=[first])) == ["whole", "playing"]


def test_other_first_chunks_do_not_wait(gpu):
    firsts = [waiting("first", 0.0), waiting("second", 0.1)]
    assert names(gpu.next_batch([waiting("playing"), firsts[1]], 8, in_work=firsts[:1])) == [
        "second",
        "playing",
    ]


@pytest.mark.parametrize(("now", "begins"), [(1.4, False), (1.6, True), (2.5, True)])
def test_a_client_that_is_soon_dry_does_not_wait(gpu, clock, now, begins):
    clock.now = now
    assert bool(gpu.next_batch([waiting("playing")], 8, in_work=[waiting("first")])) is begins


@pytest.mark.parametrize(("now", "begins"), [(1.2, False), (1.3, True)])
def test_an_answer_in_one_piece_waits_for_a_bounded_time(gpu, clock, now, begins):
    clock.now = now
    whole = waiting("whole", 1.0, stream=False)
    assert bool(gpu.next_batch([whole], 8, in_work=[waiting("first")])) is begins


def test_one_that_cannot_wait_is_enough_and_takes_the_others_along(gpu, clock):
    clock.now = 1.0
    gpu.resumed("dry")
    chunks = [waiting("playing"), waiting("whole", 0.9, stream=False), waiting("dry")]
    assert names(gpu.next_batch(chunks, 8, in_work=[waiting("first")])) == ["whole", "dry", "playing"]


def test_beside_later_chunks_and_whole_answers_nothing_waits(gpu):
    in_work = [waiting("playing"), waiting("whole", stream=False)]
    gpu.delivered("other", 9 * RATE)
    assert names(gpu.next_batch([waiting("other")], 8, in_work=in_work)) == ["other"]


@pytest.mark.parametrize(
    ("now", "frames", "gathers"),
    [(0.05, [500, 500], True), (0.05, [500, 524], False), (0.11, [100, 100], False)],
)
def test_few_chunks_wait_a_moment_while_first_tokens_are_generated(gpu, clock, now, frames, gathers):
    clock.now = now
    chunks = [waiting("playing", frames=frames[0]), waiting("whole", stream=False, frames=frames[1])]
    assert gpu.gathers(chunks, 1) is gathers
    assert not gpu.gathers(chunks, 0)


def test_nobody_waits_beside_one_who_is_soon_dry(gpu):
    assert gpu.gathers([waiting("playing")], 1)
    gpu.resumed("dry")
    assert not gpu.gathers([waiting("playing"), waiting("dry")], 1)
    assert not gpu.gathers([waiting("first"), waiting("dry")], 2)


@pytest.mark.parametrize(
    ("now", "coming", "gathers"), [(0.015, 3, True), (0.015, 2, False), (0.021, 3, False)]
)
def test_first_chunks_wait_a_moment_for_those_of_more_clients(gpu, clock, now, coming, gathers):
    clock.now = now
    chunks = [waiting("playing", frames=5000), waiting("first"), waiting("second", 0.01)]
    assert gpu.gathers(chunks, coming) is gathers


def test_on_a_cpu_nothing_waits_for_first_chunks(policy):
    policy.delivered("playing", 2 * RATE)
    assert not policy.gathers([waiting("playing")], 1)
    assert names(policy.next_batch([waiting("playing")], 1, in_work=[waiting("first")])) == ["playing"]
