"""The flow with a diffusion transformer on a GPU: padded batches, with one CUDA graph of an Euler step for
each size. What all steps share is computed once per batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache, SizedWork
from light_tts.models.flow.cfm import ConditionalFlowMatching, fixed_noise
from light_tts.models.flow.chunk_estimator import COPIES
from light_tts.models.flow.dit.estimator import DiT, Rotation
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.dit.timed import TimedDiT
from light_tts.models.flow.masks import AttentionMask
from light_tts.models.flow.padded import PaddedFlow

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # items
STEP = 64  # frames; granularity of the sizes
LONGEST = 1024  # frames of an item; a longer one is computed without a graph
AREA = ROWS[-1] * 512  # items x frames; more are computed in parts
WARM_FRAMES = 512  # 10 s of prompt and speech
FIRST_FRAMES = 320  # sizes recorded before the first request

Size = tuple[int, int]  # items, frames


class EulerStep:
    """Runs one Euler step, whose index is on the device, so that a recording of it serves for all of them.
    Shared by all instances of a flow."""

    def __init__(self, matching: ConditionalFlowMatching[DiT]) -> None:
        times, lengths = zip(*matching.steps, strict=True)
        self.timed = TimedDiT.of(matching.estimator, times)
        self.count = len(times)
        self._lengths = torch.tensor(lengths, device=self.timed.of_x.device)
        self._guidance = matching.guidance
        self._rotation = matching.estimator.rotary_embed(0, LONGEST)

    def __call__(self, x: Tensor, entered: Tensor, mask: Tensor, step: Tensor) -> None:
        """Run the step with the index `step`, (1,) int64, and add 1 to it. x: (items, frames, mels), in
        place; entered: (COPIES, items, frames, width); mask: (COPIES * items, 1, frames, frames) bool."""
        timed, rotation = self.timed, Rotation(*(angles[: x.shape[1]] for angles in self._rotation))
        blocks, final = (table.index_select(0, step)[0] for table in (timed.blocks, timed.final))
        velocity = timed.velocity(x, entered, blocks, final, rotation, FixedMask(mask))
        conditioned, unconditioned = velocity.chunk(COPIES)
        guided = (1 + self._guidance) * conditioned - self._guidance * unconditioned
        x.add_(self._lengths.index_select(0, step) * guided)
        step.add_(1)


class FixedMask:
    """Implements `Mask`. mask: (B, 1, frames, frames) bool."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def rows(self, start: int, end: int) -> Tensor:
        return self._mask[:, :, start:end]


class GraphedFlow(PaddedFlow):
    """`step`: of the flow's decoder, shared by all instances. Not thread-safe; all work uses the current
    CUDA stream, which must not change."""

    def __init__(self, flow: DiTFlow, step: EulerStep, cuda_graphs: bool = True) -> None:
        matching = GraphedMatching(flow.decoder, step, cuda_graphs)
        super().__init__(flow, decoder=matching)
        self.graphs = matching.graphs
        self._matching = matching

    @torch.inference_mode()
    def warm_up(self, items: int, first: bool = True) -> None:
        """Plan the graphs of batches of up to `items` items of up to WARM_FRAMES. The first instance also
        records what a single first chunk needs."""
        self._matching.plan(items)
        if first:
            for frames in range(STEP, FIRST_FRAMES + 1, STEP):
                self._matching.graphs.record((1, frames))


class GraphedMatching:
    """Does the same as `ConditionalFlowMatching.forward`, with a graph for each size."""

    def __init__(
        self, matching: ConditionalFlowMatching[DiT], step: EulerStep, cuda_graphs: bool = True
    ) -> None:
        width, mels = step.timed.of_x.shape
        device = step.timed.of_x.device
        self._matching = matching
        self._step = step
        self._noise = fixed_noise(mels, device)[0].T.contiguous()  # (frames, mels)
        self._room = _Room(width, mels, device)
        self.graphs = GraphCache(device, cuda_graphs)

    def __call__(self, mu: Tensor, lengths: Tensor, spks: Tensor, cond: Tensor, streaming: bool) -> Tensor:
        items, _, frames = mu.shape
        if frames > LONGEST:
            return self._matching(mu, lengths, spks, cond, streaming)
        most = max(rows for rows in ROWS if rows * rounded(frames) <= AREA)
        parts = [slice(start, start + most) for start in range(0, items, most)]
        return torch.cat(
            [self._solve(mu[part], lengths[part], spks[part], cond[part], streaming) for part in parts]
        )

    def plan(self, items: int) -> None:
        """Plan the graphs of up to `items` items."""
        counts = [rows for rows in ROWS if rows < 2 * items]
        sizes = [(rows, frames) for rows in counts for frames in range(STEP, WARM_FRAMES + 1, STEP)]
        for size in (sizes[-1], *sizes):  # those recorded later reuse the memory of the largest
            self.graphs.plan(size, partial(self._work, size))

    def _solve(self, mu: Tensor, lengths: Tensor, spks: Tensor, cond: Tensor, streaming: bool) -> Tensor:
        items, _, frames = mu.shape
        size = next(rows for rows in ROWS if rows >= items), rounded(frames)
        work = self.graphs.use(size, partial(self._work, size))
        chunk = self._matching.chunk_size if streaming else None
        speaker = spks[:, :, None].expand(-1, -1, frames)
        given = torch.cat([mu, speaker, cond], dim=1).transpose(1, 2)
        self._room.fill(size, self._noise[:frames], self._step.timed.entered(given), lengths, chunk)
        for _ in range(self._step.count):
            work.run()
        return self._room.x(size)[:items, :frames].transpose(1, 2).clone()

    def _work(self, size: Size) -> SizedWork:
        room = self._room
        advance = partial(self._step, room.x(size), room.entered(size), room.mask(size), room.step)
        return SizedWork(advance, reset=room.step.zero_)


class _Room:
    """Tensors at fixed addresses, whose memory all sizes share."""

    def __init__(self, width: int, mels: int, device: torch.device) -> None:
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._x = torch.zeros(AREA * mels, device=device)
        self._entered = torch.zeros(COPIES * AREA * width, device=device)
        self._mask = torch.zeros(COPIES * AREA * LONGEST, dtype=torch.bool, device=device)
        self._width, self._mels = width, mels

    def x(self, size: Size) -> Tensor:
        """Return the state: (items, frames, mels)"""
        return _first(self._x, (*size, self._mels))

    def entered(self, size: Size) -> Tensor:
        """(COPIES, items, frames, width)"""
        return _first(self._entered, (COPIES, *size, self._width))

    def mask(self, size: Size) -> Tensor:
        """(COPIES * items, 1, frames, frames) bool"""
        return _first(self._mask, (COPIES * size[0], 1, size[1], size[1]))

    def fill(self, size: Size, noise: Tensor, entered: Tensor, lengths: Tensor, chunk: int | None) -> None:
        """Write the inputs of a batch of up to this size and reset to step 0. noise: (frames, mels); entered:
        (COPIES, items, frames, width); lengths: (items,); chunk: see AttentionMask. Everything beyond must be
        finite, as a weight of 0 times NaN is NaN."""
        items, frames = entered.shape[1:3]
        self.x(size).zero_()[:items, :frames] = noise
        self.entered(size).zero_()[:, :items, :frames] = entered
        padded = F.pad(lengths, (0, size[0] - items), value=1)
        seen = AttentionMask(padded, size[1], chunk).rows(0, size[1])
        self.mask(size).unflatten(0, (COPIES, size[0])).copy_(seen)
        self.step.zero_()


def rounded(frames: int) -> int:
    """Return the padded size in which items of this many frames are computed."""
    return -(-frames // STEP) * STEP


def _first(flat: Tensor, shape: Sequence[int]) -> Tensor:
    return flat[: torch.Size(shape).numel()].view(shape)
