"""The state of earlier frames cached by the packed flow, and the frames of an item that remain to be
computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from light_tts.kernels.flow.packed_attention import Prefix
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.memos import Memo
from light_tts.models.flow.packed_rows import Parts
from light_tts.models.flow.page_store import (
    ANY_PAGES,
    COPIES,
    PageLimits,
    PageStore,
    TooLittleMemory,
)
from light_tts.models.flow.pages import CachedPast, Lease, PagePool
from light_tts.models.flow.step_estimator import StepEstimator

log = logging.getLogger(__name__)

# With pages of 1 s: a voice and three streams of 5 s; 128 such streams with 64 voices, and some more.
USEFUL_PAGES = PageLimits(least=16, most=1000)


@dataclass(frozen=True)
class PackedSpan:
    """The frames [start, end) of prompt and speech are to be computed. prompt: number of prompt frames. mel:
    of the speech before `start`; past: the state it was cached in; lease: the pages of the frames before
    `start`, followed by those for the chunks to be cached."""

    item: FlowItem
    prompt: int
    start: int
    end: int
    mel: Tensor | None = None
    past: CachedPast | None = None
    lease: Lease | None = None

    @property
    def frames(self) -> int:
        return self.end - self.start


class PackedMemory:
    """`store`: the pages; `ratio`: frames per token; `lookahead`: number of tokens after a chunk that it
    depends on. Shared by all instances of a process; thread-safe."""

    def __init__(self, store: PageStore, ratio: int, lookahead: int) -> None:
        self.store = store
        self.pool = PagePool(store.pages)
        self._page, self._edge = store.frames, store.edge
        self._ratio = ratio
        self._lookahead = lookahead
        self._on_gpu = store.layers[0].device.type == "cuda"

    def span(self, item: FlowItem, prompt: int, end: int) -> PackedSpan:
        """Return the span of a streamed item with frames up to `end`."""
        past: CachedPast | None = item.stream_memo.content or item.voice_memo.content
        # A retried item has already stored its own frames; its last chunk is computed again.
        known = past.lease.pages[: (end - 1) // self._page] if past else ()
        start = self._page * len(known)
        lease = self.pool.lease(known, 0 if item.finalize else end // self._page - len(known))
        mel = past.mel[: max(0, start - prompt)] if past else None
        return PackedSpan(item, prompt, start, end, mel, past, lease)

    def cached_frames(self, voice: Memo, stream: Memo) -> int:
        past: CachedPast | None = stream.content or voice.content
        return self._page * len(past.lease.pages) if past else 0

    def wait(self, spans: Sequence[PackedSpan]) -> None:
        """Make the current stream wait until others have written the state that these spans continue."""
        for span in spans:
            ready = None if span.past is None else span.past.ready
            if ready is not None and not ready.query():
                torch.cuda.current_stream().wait_event(ready)

    def hold(self, spans: Sequence[PackedSpan]) -> torch.cuda.Event | None:
        """Keep the pages of `spans` from being reused until the device has finished the work queued so far.
        Returns the event of that, or None if it is immediate."""
        if not self._on_gpu:
            return None
        ready = torch.cuda.Event()
        ready.record()
        for span in spans:
            if span.lease is not None:
                self.pool.hold(span.lease, ready)
        return ready

    def remember(self, span: PackedSpan, mel: Tensor, ready: torch.cuda.Event | None) -> None:
        """mel: (frames, mels) of all speech up to the span's end; ready: see Past."""
        item, lease = span.item, span.lease
        if item.finalize:
            item.stream_memo.content = None
        if lease is None:
            return
        if lease.pages and not item.finalize:
            kept = max(0, self._page * len(lease.pages) - span.prompt)
            item.stream_memo.content = CachedPast(lease, mel[:kept], ready)
        voice: CachedPast | None = item.voice_memo.content
        if voice is None:  # its chunks that see none of the speech
            count = (span.prompt - self._ratio * self._lookahead) // self._page
            if not 0 < count <= len(lease.pages):
                return
            voice = CachedPast(self.pool.lease(lease.pages[:count]), mel[:0], ready)
        self.pool.use_voice(item.voice_memo, voice)

    def place(self, parts: Parts, spans: Sequence[PackedSpan]) -> list[Prefix]:
        """Write into `parts` the pages of the items, and the rows that their convolutions read from and save
        to the cache."""
        edge, prefixes, first_page, first_row = self._edge, [], 0, 0
        for span in spans:
            pages = span.lease.pages if span.lease else ()
            prefixes.append(Prefix(span.start, first_page, self._page * len(pages)))
            parts.pages[first_page : first_page + len(pages)] = pages
            before, keep = (part.reshape(COPIES, -1)[:, first_row:] for part in (parts.before, parts.keep))
            known = span.start // self._page
            if known:
                before[:, : span.frames] = pages[known - 1]
            for place, page in enumerate(pages[known:], 1):
                end = self._page * place
                keep[:, end - edge : end] = edge * page + np.arange(edge)
            first_page += len(pages)
            first_row += span.frames
        return prefixes


def reserve(flow: BaseFlow, estimator: StepEstimator[Any], room: int, automatic: bool) -> PackedMemory | None:
    """Return a memory of at most `room` bytes, less if the device has no more; log its size. None: the device
    has none, or `automatic` (nobody asked for `room`) and it would have fewer than USEFUL_PAGES; more are not
    made then. Raises TooLittleMemory if `room` was asked for and not even one page fits."""
    try:
        memory = remember(flow, estimator, room, USEFUL_PAGES if automatic else ANY_PAGES)
    except TooLittleMemory as error:
        if not automatic:
            raise
        log.info("the flow caches nothing: %s", error)
        return None
    except torch.OutOfMemoryError as error:
        log.warning("flow_memory_gpu_mb: no memory is left, the flow caches nothing: %s", error)
        return None
    store = memory.store
    log.info(
        "the flow caches the state of up to %d chunks of %d frames: %d of %d MiB (flow_memory_gpu_mb)",
        store.pages,
        store.frames,
        store.pages * store.page_bytes >> 20,
        room >> 20,
    )
    return memory


def remember(
    flow: BaseFlow, estimator: StepEstimator[Any], room: int, limits: PageLimits = ANY_PAGES
) -> PackedMemory:
    """Return a memory of at most `room` bytes, shared by all instances. Raises TooLittleMemory if fewer pages
    than allowed fit, torch.OutOfMemoryError if the device has no memory for them, and ValueError if the
    attention chunks of the flow's encoder and estimator differ or are too short, see PageStore."""
    frames = flow.decoder.chunk_size
    if frames != flow.ratio * flow.chunk_size:
        raise ValueError("the attention chunks of the flow's encoder and estimator differ")
    return PackedMemory(estimator.keep(room, frames, limits), flow.ratio, flow.lookahead)
