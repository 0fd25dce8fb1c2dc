"""The packed flow's memory of streams and voices saves frames and changes the mel only by rounding. On a
machine without a GPU the references stand in for the kernels, as in test_packed_flow.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from support.flow_families import FAMILIES, ONLY_DIT, ONLY_UNET, load_flow, pack
from support.flow_streams import HOP, RATIO, Stream, Voice, assert_close
from support.packed_on_cpu import blocks_in_one_kernel, kernels_or_references

from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.memos import Memo
from light_tts.models.flow.packed import PackedFlow
from light_tts.models.flow.packed_memory import PackedMemory, remember, reserve
from light_tts.models.flow.padded import PaddedFlow
from light_tts.models.flow.page_store import ANY_PAGES, TooLittleMemory
from light_tts.models.flow.pages import CachedPast, PagePool

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with kernels_or_references(DEVICE):
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def flow(family: str) -> BaseFlow:
    """With few Euler steps, which takes less time."""
    return load_flow(family, DEVICE, steps=2)


class Counting(PackedFlow):
    """Counts the frames that are computed."""

    computed = 0

    def _integrate(self, spans):
        self.computed += sum(span.frames for span in spans)
        return super()._integrate(spans)


def model(flow: BaseFlow, pages: int) -> tuple[Counting, PackedMemory]:
    if DEVICE.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    parts = pack(flow, torch.float32)
    page_bytes = remember(flow, parts[0], 1 << 28).store.page_bytes
    memory = remember(flow, parts[0], pages * page_bytes)
    assert memory.store.pages == pages
    return Counting(flow, *parts, 16, memory), memory


def free_pages(memory: PackedMemory) -> int:
    """Return the number of free pages once the device has finished, which holds those of its batches."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return memory.pool.free


@pytest.mark.parametrize("growth", [1, 4])
@pytest.mark.parametrize(("prompt", "tokens"), [(0, 60), (25, 28), (87, 100), (53, 4)])
def test_each_chunk_is_what_a_computation_from_the_beginning_gives(flow, prompt, tokens, growth):
    remembering, memory = model(flow, 16)
    stream = Stream(flow, Voice(flow, prompt, prompt), tokens, tokens)
    for item in stream.chunks(growth, last_sees_all=growth > 1):
        assert_close(remembering([item])[0], PaddedFlow(flow)([item])[0])
    del stream, item
    gc.collect()
    assert free_pages(memory) == 16


@ONLY_UNET
@pytest.mark.parametrize("resnets", [False, True])
def test_so_do_blocks_in_one_kernel(flow, resnets, monkeypatch):
    blocks_in_one_kernel(monkeypatch, resnets=resnets)
    remembering, _ = model(flow, 16)
    for item in Stream(flow, Voice(flow, 25, 25), 60, 60).chunks(1, last_sees_all=False):
        assert_close(remembering([item])[0], PaddedFlow(flow)([item])[0])


def test_a_chunk_costs_its_own_frames_and_a_known_voice_nothing(flow):
    remembering, memory = model(flow, 16)
    voice, costs = Voice(flow, 3, 60), []
    for seed in (1, 2):
        for item in Stream(flow, voice, seed, 100).chunks():
            remembering.computed = 0
            remembering([item])
            costs.append(remembering.computed // RATIO)
    # 60 tokens of the prompt are two chunks and ten tokens of a third, to which the first 15 spoken belong.
    assert costs == [100, HOP, HOP, 10, 2 * HOP, HOP, HOP, 10]
    assert free_pages(memory) == 16 - 2  # the voice's
    assert remembering.cached_frames(voice.memo, Memo()) == 2 * HOP * RATIO
    assert remembering.cached_frames(Memo(), Memo()) == 0


def test_sixteen_streams_at_once_are_each_as_alone(flow):
    """Four voices, different lengths, some last chunks with full attention, and too few pages."""
    remembering, memory = model(flow, 20)
    voices = [Voice(flow, number, 20 + 15 * number) for number in range(4)]
    streams = [Stream(flow, voices[n % 4], n, 30 + 4 * n) for n in range(16)]
    plans = [
        stream.chunks(4 if n % 5 == 0 else 1, last_sees_all=n % 5 == 0) for n, stream in enumerate(streams)
    ]
    alone = [[PaddedFlow(flow)([item])[0] for item in plan] for plan in plans]
    for turn in range(max(map(len, plans))):
        present = [n for n, plan in enumerate(plans) if turn < len(plan)]
        for n, mel in zip(present, remembering([plans[n][turn] for n in present]), strict=True):
            assert_close(mel, alone[n][turn])
    plans.clear()
    assert free_pages(memory) >= 20 - 4  # what is left are the voices'


def test_without_pages_chunks_are_computed_again_and_voices_make_room(flow):
    remembering, memory = model(flow, 4)
    first, second = (Stream(flow, Voice(flow, seed, 60), seed, 100) for seed in (5, 6))
    for item in first.chunks():
        assert_close(remembering([item])[0], PaddedFlow(flow)([item])[0])
    assert free_pages(memory) == 2 and first.voice.memo.content is not None
    costs = []
    for item in second.chunks():
        remembering.computed = 0
        assert_close(remembering([item])[0], PaddedFlow(flow)([item])[0])
        costs.append(remembering.computed // RATIO)
    assert first.voice.memo.content is None  # nobody spoke in it
    assert costs == [100, 25, 50, 60]  # four pages: the third chunk is not kept


def test_a_stream_goes_on_without_a_memory_of_its_beginning(flow):
    """As after the death of a process: the last two chunks are spoken again by another one."""
    remembering, _ = model(flow, 16)
    chunks = Stream(flow, Voice(flow, 8, 61), 8, 110).chunks()
    kept = [remembering([item])[0] for item in chunks]
    again, _ = model(flow, 16)
    for item, known in zip(Stream(flow, Voice(flow, 8, 61), 8, 110).chunks()[2:], kept[2:], strict=True):
        assert_close(again([item])[0], known)


def test_a_chunk_that_is_tried_again_is_the_same(flow):
    """As after an error of the vocoder."""
    remembering, _ = model(flow, 16)
    for item in Stream(flow, Voice(flow, 9, 61), 9, 60).chunks():
        first, second = remembering([item])[0], remembering([item])[0]
        assert_close(first, second)


def test_a_failed_batch_keeps_nothing(flow, monkeypatch):
    remembering, memory = model(flow, 16)
    stream = Stream(flow, Voice(flow, 10, 61), 10, 60)
    monkeypatch.setattr(remembering, "_fill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remembering(stream.chunks()[:1])
    gc.collect()
    assert free_pages(memory) == 16 and stream.memo.content is None and stream.voice.memo.content is None


def test_too_little_room_is_refused(flow):
    with pytest.raises(TooLittleMemory, match=r"a page of 50 frames needs [\d.]+ MiB"):
        remember(flow, pack(flow, torch.float32)[0], 1000)


@ONLY_DIT
def test_a_page_holds_all_frames_that_a_convolution_needs_after_it(flow):
    estimator, _ = pack(flow, torch.float32)
    assert estimator.keep(1 << 28, 30, ANY_PAGES).edges[0].shape[3] == 30
    with pytest.raises(ValueError, match=r"29 frames is shorter than a convolution's 30"):
        estimator.keep(1 << 28, 29, ANY_PAGES)


@pytest.mark.parametrize("automatic", [False, True])
def test_memory_that_nobody_asked_for_has_a_useful_number_of_pages(flow, automatic):
    estimator, _ = pack(flow, torch.float32)
    page = remember(flow, estimator, 1 << 28).store.page_bytes
    memory = {pages: reserve(flow, estimator, pages * page, automatic) for pages in (15, 16, 1001)}
    found = {asked: kept.store.pages for asked, kept in memory.items() if kept is not None}
    assert found == ({16: 16, 1001: 1000} if automatic else {15: 15, 16: 16, 1001: 1001})
    if automatic:
        assert reserve(flow, estimator, 0, automatic) is None
    else:
        with pytest.raises(TooLittleMemory):
            reserve(flow, estimator, page - 1, automatic)


@pytest.mark.parametrize(
    ("automatic", "asked", "free", "got"),
    [
        (True, 100, 100, 100),
        (True, 100, 60, 50),
        (True, 100, 24, None),  # 25 and 12 pages: too many and too few
        (False, 100, 24, 12),
        (False, 100, 1, 1),
        (False, 1, 0, None),
    ],
)
def test_a_device_without_enough_memory_is_no_error(flow, monkeypatch, caplog, automatic, asked, free, got):
    estimator, _ = pack(flow, torch.float32)
    page, zeros = remember(flow, estimator, 1 << 28).store.page_bytes, torch.zeros

    def limited(pages: int, *shape: int, **options):
        if pages > free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(pages, *shape, **options)

    monkeypatch.setattr(torch, "zeros", limited)
    caplog.set_level("INFO", "light_tts")
    memory = reserve(flow, estimator, asked * page, automatic)
    assert (memory and memory.store.pages) == got
    assert (f"up to {got} chunks" if got else "the flow caches nothing") in caplog.text
    assert ("no memory" in caplog.text) == (got != asked)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU")
def test_more_pages_than_the_gpu_has_memory_for(flow):
    """Two times its memory, all of it, a half, ..."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    memory = reserve(flow, pack(flow, torch.float32)[0], 2 * total, automatic=False)
    assert memory is not None and 0 < memory.store.pages * memory.store.page_bytes < total
    del memory
    torch.cuda.empty_cache()


def test_pages_are_shared_and_given_back_with_their_last_lease():
    pool = PagePool(5)
    voice = pool.lease((), 2)
    stream = pool.lease(voice.pages, 2)
    assert stream.pages[:2] == voice.pages and len(set(stream.pages)) == 4 and pool.free == 1
    short = pool.lease((), 3)
    assert len(short.pages) == 1 and pool.free == 0
    del voice
    assert pool.free == 0
    del stream
    assert pool.free == 4


def test_of_voices_that_nobody_speaks_in_the_one_used_longest_ago_makes_room():
    pool, mel = PagePool(6), torch.zeros(0, 80)
    memos = [Memo() for _ in range(3)]
    for memo in memos:
        pool.use_voice(memo, CachedPast(pool.lease((), 2), mel, None))
    speaking = pool.lease(memos[0].content.lease.pages)
    pool.use_voice(memos[1], memos[1].content)
    assert len(pool.lease((), 1).pages) == 1
    assert [memo.content is None for memo in memos] == [False, False, True]
    assert len(pool.lease((), 4).pages) == 4
    assert [memo.content is None for memo in memos] == [False, True, True]
    assert speaking.pages == memos[0].content.lease.pages
    memos.clear()
    del speaking
    gc.collect()
    assert pool.free == 6
