"""What the packed flow keeps of earlier frames, and which frames of an item are left to be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from light_tts.kernels.flow.packed_attention import Prefix
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.pages import Lease, PagePool, Past
from light_tts.models.flow.unet.kept import COPIES, EDGE, Kept
from light_tts.models.flow.unet.rows import Parts


@dataclass(frozen=True)
class Span:
    """The frames [start, end) of prompt and speech are to be computed. prompt: frames of the prompt. mel: of
    the speech before `start`; past: what that was kept in; lease: the pages of the frames before `start`, and
    behind them those of the chunks that are to be kept."""

    item: FlowItem
    prompt: int
    start: int
    end: int
    mel: Tensor | None = None
    past: Past | None = None
    lease: Lease | None = None

    @property
    def frames(self) -> int:
        return self.end - self.start


class FlowMemory:
    """`kept`: the pages; `ratio`: frames a token; `lookahead`: tokens after a chunk that it depends on.
    Shared by all instances of a process; thread-safe."""

    def __init__(self, kept: Kept, ratio: int, lookahead: int) -> None:
        self.kept = kept
        self.pool = PagePool(kept.pages)
        self._page = kept.frames
        self._ratio = ratio
        self._lookahead = lookahead
        self._on_gpu = kept.layers[0].device.type == "cuda"

    def span(self, item: FlowItem, prompt: int, end: int) -> Span:
        """Of an item that is streamed, with frames up to `end`."""
        past: Past | None = item.stream_memo.content or item.voice_memo.content
        # An item that is tried again has had its own frames: its last chunk is computed again.
        known = past.lease.pages[: (end - 1) // self._page] if past else ()
        start = self._page * len(known)
        lease = self.pool.lease(known, 0 if item.finalize else end // self._page - len(known))
        mel = past.mel[: max(0, start - prompt)] if past else None
        return Span(item, prompt, start, end, mel, past, lease)

    def wait(self, spans: Sequence[Span]) -> None:
        """Let the current stream wait until others have written what these go on from."""
        for span in spans:
            if span.past is not None and span.past.ready is not None:
                torch.cuda.current_stream().wait_event(span.past.ready)

    def hold(self, spans: Sequence[Span]) -> torch.cuda.Event | None:
        """Nobody else gets the pages of `spans` until the device has done what is queued by now. -> when it
        has; None: at once."""
        if not self._on_gpu:
            return None
        ready = torch.cuda.Event()
        ready.record()
        for span in spans:
            if span.lease is not None:
                self.pool.hold(span.lease, ready)
        return ready

    def remember(self, span: Span, mel: Tensor, ready: torch.cuda.Event | None) -> None:
        """mel: (frames, mels) of all speech up to the span's end; ready: see Past."""
        item, lease = span.item, span.lease
        if item.finalize:
            item.stream_memo.content = None
        if lease is None:
            return
        if lease.pages and not item.finalize:
            kept = max(0, self._page * len(lease.pages) - span.prompt)
            item.stream_memo.content = Past(lease, mel[:kept], ready)
        voice: Past | None = item.voice_memo.content
        if voice is None:  # its chunks that see none of the speech
            count = (span.prompt - self._ratio * self._lookahead) // self._page
            if not 0 < count <= len(lease.pages):
                return
            voice = Past(self.pool.lease(lease.pages[:count]), mel[:0], ready)
        self.pool.use_voice(item.voice_memo, voice)

    def place(self, parts: Parts, spans: Sequence[Span]) -> list[Prefix]:
        """Write into `parts` which pages the items have, and which rows their convolutions go on from and
        leave to others."""
        prefixes, first_page, first_row = [], 0, 0
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
                keep[:, end - EDGE : end] = EDGE * page + np.arange(EDGE)
            first_page += len(pages)
            first_row += span.frames
        return prefixes
