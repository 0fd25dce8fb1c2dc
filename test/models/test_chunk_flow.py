"""The flow on a CPU: caching the state of streams and voices saves work and does not change the result."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.flow_streams import HOP, RATIO, Stream, Voice, assert_close

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.chunked import ChunkFlow, chunk_flow
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.memos import MemoLimit
from light_tts.models.flow.padded import PaddedFlow

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")
ROOMY = 1 << 28


@pytest.fixture(scope="module", params=["cosyvoice2", "cosyvoice3"])
def flow(request: pytest.FixtureRequest) -> BaseFlow:
    """The latter with few Euler steps, which takes less time."""
    checkpoint = GOLDEN / request.param / "checkpoint"
    if request.param == "cosyvoice2":
        return Flow.from_checkpoint(checkpoint, load_config(checkpoint), CPU)
    config = load_config3(checkpoint)
    return DiTFlow.from_checkpoint(checkpoint, replace(config, flow=replace(config.flow, n_timesteps=2)), CPU)


def new_stream(flow: BaseFlow, seed: int, prompt: int, tokens: int) -> Stream:
    """A stream with its own voice."""
    return Stream(flow, Voice(flow, seed, prompt), seed, tokens)


class CountingEstimator:
    """Counts the frames that an estimator computes."""

    def __init__(self, estimator) -> None:
        self._estimator = estimator
        self.frames = 0

    def __call__(self, noise, *arguments):
        self.frames += len(noise)
        return self._estimator(noise, *arguments)

    def __getattr__(self, name):
        return getattr(self._estimator, name)


def counting(flow: BaseFlow, limit: MemoLimit) -> tuple[ChunkFlow, CountingEstimator]:
    model = chunk_flow(flow, limit)
    model._estimator = counter = CountingEstimator(model._estimator)
    return model, counter


@pytest.mark.parametrize(("growth", "last_sees_all"), [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize(("prompt", "tokens"), [(0, 90), (2, 31), (25, 28), (40, 100), (87, 130), (53, 4)])
def test_each_chunk_is_what_a_computation_from_the_beginning_gives(
    flow, prompt, tokens, growth, last_sees_all
):
    stream = new_stream(flow, prompt, prompt, tokens)
    remembering, plain = chunk_flow(flow, MemoLimit(ROOMY)), PaddedFlow(flow)
    for item in stream.chunks(growth, last_sees_all):
        (mel,), (expected,) = remembering([item]), plain([item])
        assert_close(mel, expected)


@pytest.mark.parametrize("prompt", [0, 60])
def test_a_whole_item_is_what_the_plain_path_gives(flow, prompt):
    stream = new_stream(flow, 1, prompt, 70)
    item = stream.item(70, streaming=False, finalize=True)
    (mel,), (expected,) = chunk_flow(flow, MemoLimit(ROOMY))([item]), PaddedFlow(flow)([item])
    assert_close(mel, expected)


def test_the_samples_do_not_depend_on_what_was_kept(flow):
    """Bit-identical: with everything cached, with a known voice, with memos evicted after each chunk, and
    from the middle of the stream on, as after the death of a process."""
    model, stream = chunk_flow(flow, MemoLimit(ROOMY)), new_stream(flow, 2, 61, 110)
    kept = [model([item])[0] for item in stream.chunks()]
    again = [model([item])[0] for item in Stream(flow, stream.voice, 2, 110).chunks()]
    forgotten = []
    for item in new_stream(flow, 2, 61, 110).chunks():
        forgotten += model([item])
        item.voice_memo.content = item.stream_memo.content = None
    resumed = [model([item])[0] for item in new_stream(flow, 2, 61, 110).chunks()[2:]]
    for other in (again, forgotten, kept[:2] + resumed):
        assert len(other) == len(kept) > 3
        assert all(torch.equal(a, b) for a, b in zip(kept, other, strict=True))


def test_a_chunk_costs_its_own_frames_and_a_known_voice_nothing(flow):
    model, counter = counting(flow, MemoLimit(ROOMY))
    stream = new_stream(flow, 3, 60, 100)
    costs = []
    for each in (stream, Stream(flow, stream.voice, 3, 100)):
        for item in each.chunks():
            counter.frames = 0
            model([item])
            costs.append(counter.frames // RATIO)
    chunk, chunks = HOP, len(costs) // 2
    # 60 tokens of the prompt are two chunks and ten tokens of a third, to which the first 15 spoken belong.
    assert costs[:chunks] == [100, chunk, chunk, 10]
    assert costs[chunks:] == [2 * chunk, chunk, chunk, 10]


def test_a_stream_that_has_ended_keeps_nothing(flow):
    limit = MemoLimit(ROOMY)
    model, stream = chunk_flow(flow, limit), new_stream(flow, 4, 60, 70)
    *chunks, last = stream.chunks()
    for item in chunks:
        model([item])
    assert stream.memo.content is not None
    model([last])
    assert stream.memo.content is None
    assert limit.bytes == stream.voice.memo.content.bytes


def test_a_stream_that_is_broken_off_keeps_nothing(flow):
    limit = MemoLimit(ROOMY)
    model, stream = chunk_flow(flow, limit), new_stream(flow, 5, 60, 70)
    items = stream.chunks()
    model(items[:1])
    assert limit.bytes > 0
    del stream, items
    gc.collect()
    assert limit.bytes == 0


def test_beyond_the_limit_what_was_used_longest_ago_is_dropped(flow):
    one = new_stream(flow, 6, 60, 70)
    roomy = MemoLimit(ROOMY)
    chunk_flow(flow, roomy)(one.chunks()[:1])
    limit = MemoLimit(int(2.5 * one.memo.content.bytes))
    model, streams = chunk_flow(flow, limit), [new_stream(flow, 7 + n, 60, 70) for n in range(4)]
    for stream in streams:
        model(stream.chunks()[:1])
        assert limit.bytes <= limit.limit
    assert streams[0].memo.content is None and streams[0].voice.memo.content is None
    assert streams[-1].memo.content is not None


def test_with_too_little_memory_for_a_stream_each_chunk_is_computed_from_the_beginning(flow):
    limit = MemoLimit(0)
    (model, counter), stream = counting(flow, limit), new_stream(flow, 11, 60, 70)
    for item in stream.chunks():
        (mel,), (expected,) = model([item]), PaddedFlow(flow)([item])
        assert torch.equal(mel, expected)
    assert counter.frames == 0 and limit.bytes == 0


def test_too_many_or_no_tokens_are_refused(flow):
    model, stream = chunk_flow(flow, MemoLimit(ROOMY)), new_stream(flow, 12, 10, 8000)
    with pytest.raises(ValueError, match="exceed 15000"):
        model([stream.item(8000, True, False)])
    with pytest.raises(ValueError, match="nothing to speak"):
        model([stream.item(3, True, False)])
