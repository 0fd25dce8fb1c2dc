"""The frames that a chunk of a part is computed from: a bounded number of earlier ones, then its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from light_tts.models.vocoder.causal_hift import Reach
from light_tts.models.vocoder.interface import CausalItem, CausalState, SourceNoise


@dataclass(frozen=True)
class Tail(CausalState):
    """The last frames of a part. first_frame: position of the first of them in the part; mel: (mel channels,
    frames); source: (samples,) from the first of them on, up to the last frame of known pitch; turns:
    (waves,) float64, see `CausalSource.total`, up to the same frame."""

    first_frame: int
    mel: Tensor
    source: Tensor
    turns: Tensor

    @classmethod
    def before(cls, item: CausalItem, waves: int) -> Tail:
        """Return what an item continues: its state, or the empty start of a part."""
        if item.state is not None:
            assert isinstance(item.state, Tail)
            return item.state
        mel = item.mel
        return cls(0, mel.new_empty(len(mel), 0), mel.new_empty(0), mel.new_zeros(waves, dtype=torch.float64))


@dataclass(frozen=True)
class Window:
    """The frames that a chunk is computed from: those of a tail, then its own. Positions are frames after the
    first of them. kept, frames: ends of the tail's frames and of all; voiced, pitched: the ends of the source
    before and after the chunk; done, ready: likewise, of the samples; drop: the first frame that the next
    chunk needs."""

    kept: int
    frames: int
    voiced: int
    pitched: int
    done: int
    ready: int
    drop: int

    @classmethod
    def of(cls, reach: Reach, tail: Tail, item: CausalItem, samples_per_frame: int) -> Window:
        kept = tail.mel.shape[1]
        frames = kept + item.mel.shape[1]
        ready = frames if item.final else max(frames - reach.held, 0)
        return cls(
            kept=kept,
            frames=frames,
            voiced=len(tail.source) // samples_per_frame,
            pitched=frames if item.final else max(frames - reach.lookahead, 0),
            done=max(kept - reach.held, 0),
            ready=ready,
            drop=max(ready - reach.context, 0),
        )


def noise_from(item: CausalItem, first_sample: int) -> SourceNoise | None:
    """Return the item's noise from a sample of the part on."""
    return item.noise and replace(item.noise, first_sample=first_sample)
