"""The causal vocoder in plain PyTorch, on any device.

A chunk is computed from its own frames and a bounded number of frames before them, so its cost does not grow
with the length of the part.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from light_tts.common import random
from light_tts.common.cuda_graphs import GraphCache
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.interface import CausalItem, CausalState
from light_tts.models.vocoder.noise import source_noise


@dataclass(frozen=True)
class Tail(CausalState):
    """The last frames of a part. first_frame: position of the first of them in the part; mel: (mel channels,
    frames); source: (samples,) from the first of them on, up to the last frame of known pitch; turns:
    (waves,) float64, see `CausalSource.total`, up to the same frame."""

    first_frame: int
    mel: Tensor
    source: Tensor
    turns: Tensor


class TorchCausalVocoder:
    """Implements `CausalVocoder`. batched: items of equal shapes are computed together; otherwise each is
    computed alone, and its samples are the same to the last bit whatever the other items are."""

    graphs: GraphCache | None = None

    def __init__(self, hift: CausalHift, batched: bool) -> None:
        self._hift = hift
        self._batched = batched
        self.held_back = hift.held_frames * hift.samples_per_frame
        source_frames = -(-hift.source_context // hift.samples_per_frame)
        self._context = max(hift.mel_context, source_frames, hift.f0_predictor.context)

    @torch.inference_mode()
    def speak(self, items: Sequence[CausalItem]) -> list[tuple[Tensor, CausalState | None]]:
        groups: dict[Hashable, list[int]] = {}
        tails = [self._tail(item) for item in items]
        for row, (item, tail) in enumerate(zip(items, tails, strict=True)):
            shape = (item.final, item.mel.shape[1], tail.mel.shape[1])
            groups.setdefault(shape if self._batched else row, []).append(row)
        results: dict[int, tuple[Tensor, CausalState | None]] = {}
        for rows in groups.values():
            spoken = self._speak([items[row] for row in rows], [tails[row] for row in rows])
            results.update(zip(rows, spoken, strict=True))
        return [results[row] for row in range(len(items))]

    def warm_up(self, items: int, first: bool = True) -> None:
        """Nothing to prepare."""

    def _tail(self, item: CausalItem) -> Tail:
        if item.state is not None:
            assert isinstance(item.state, Tail)
            return item.state
        mel = item.mel
        turns = mel.new_zeros(self._hift.m_source.waves, dtype=torch.float64)
        return Tail(0, mel.new_empty(len(mel), 0), mel.new_empty(0), turns)

    def _speak(self, items: list[CausalItem], tails: list[Tail]) -> list[tuple[Tensor, CausalState | None]]:
        """Compute items of equal shapes. Positions are frames after the first one kept."""
        hift, final = self._hift, items[0].final
        kept = tails[0].mel.shape[1]
        mel = torch.stack(
            [torch.cat([tail.mel, item.mel], dim=1) for item, tail in zip(items, tails, strict=True)]
        )
        end = mel.shape[2] if final else max(mel.shape[2] - hift.f0_predictor.lookahead, 0)
        source, turns = self._source(mel, end, items, tails)
        done = max(kept - hift.held_frames, 0)
        ready = mel.shape[2] if final else max(mel.shape[2] - hift.held_frames, 0)
        wave = self._wave(mel[:, :, :end], source, done, ready, final)
        if final:
            return [(samples, None) for samples in wave]
        drop = max(ready - self._context, 0)
        return [
            (
                wave[row],
                Tail(
                    tail.first_frame + drop,
                    mel[row, :, drop:].clone(),
                    source[row, drop * hift.samples_per_frame :].clone(),
                    turns[row].clone(),
                ),
            )
            for row, tail in enumerate(tails)
        ]

    def _source(
        self, mel: Tensor, end: int, items: list[CausalItem], tails: list[Tail]
    ) -> tuple[Tensor, Tensor]:
        """Return the source up to frame `end` (batch, samples), and the turns there."""
        hift = self._hift
        source = torch.stack([tail.source for tail in tails])
        turns = torch.stack([tail.turns for tail in tails])
        begin = source.shape[1] // hift.samples_per_frame
        if end == begin:
            return source, turns
        context = hift.f0_predictor.context
        final = end == mel.shape[2]
        if begin < context:  # then no frame of the part has been dropped
            f0 = hift.f0(mel, first=True, final=final)[:, begin:]
        else:
            f0 = hift.f0(mel[:, :, begin - context :], first=False, final=final)
        noises = [
            item.noise
            and replace(item.noise, first_sample=(tail.first_frame + begin) * hift.samples_per_frame)
            for item, tail in zip(items, tails, strict=True)
        ]
        samples = (end - begin) * hift.samples_per_frame
        noise = source_noise(random.uniform, noises, samples, hift.m_source.waves, mel.device)
        total = hift.m_source.total(f0, turns)
        new = hift.m_source.mix(hift.m_source.sines_at(total), f0, noise)
        return torch.cat([source, new], dim=1), total[:, :, -1]

    def _wave(self, mel: Tensor, source: Tensor, done: int, ready: int, final: bool) -> Tensor:
        """Return the samples from frame `done` to frame `ready` (batch, samples)."""
        hift = self._hift
        if ready == done:
            return mel.new_empty(len(mel), 0)
        first = done < self._context  # then no frame of the part has been dropped
        if not first:
            mel = mel[:, :, done - hift.mel_context :]
            source = source[:, done * hift.samples_per_frame - hift.source_context :]
        wave = hift.decode(mel, source, first, final)
        return wave[:, wave.shape[1] - (ready - done) * hift.samples_per_frame :]
