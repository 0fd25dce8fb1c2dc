"""The causal vocoder in plain PyTorch, on any device.

A chunk is computed from its own frames and a bounded number of frames before them, so its cost does not grow
with the length of the part.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from light_tts.common import random
from light_tts.common.cuda_graphs import GraphCache
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.causal_window import Tail, Window, noise_from
from light_tts.models.vocoder.interface import CausalItem, CausalState
from light_tts.models.vocoder.noise import source_noise


class TorchCausalVocoder:
    """Implements `CausalVocoder`. batched: items of equal shapes are computed together; otherwise each is
    computed alone, and its samples are the same to the last bit whatever the other items are."""

    graphs: GraphCache | None = None

    def __init__(self, hift: CausalHift, batched: bool) -> None:
        self._hift = hift
        self._batched = batched
        self.held_back = hift.held_frames * hift.samples_per_frame

    @torch.inference_mode()
    def speak(self, items: Sequence[CausalItem]) -> list[tuple[Tensor, CausalState | None]]:
        groups: dict[Hashable, list[int]] = {}
        tails = [Tail.before(item, self._hift.m_source.waves) for item in items]
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

    def _speak(self, items: list[CausalItem], tails: list[Tail]) -> list[tuple[Tensor, CausalState | None]]:
        """Compute items of equal shapes."""
        hift, final = self._hift, items[0].final
        window = Window.of(hift.reach, tails[0], items[0], hift.samples_per_frame)
        mel = torch.stack(
            [torch.cat([tail.mel, item.mel], dim=1) for item, tail in zip(items, tails, strict=True)]
        )
        source, turns = self._source(mel, window, items, tails)
        wave = self._wave(mel[:, :, : window.pitched], source, window, final)
        if final:
            return [(samples, None) for samples in wave]
        drop = window.drop
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
        self, mel: Tensor, window: Window, items: list[CausalItem], tails: list[Tail]
    ) -> tuple[Tensor, Tensor]:
        """Return the source up to the last frame of known pitch (batch, samples), and the turns there."""
        hift = self._hift
        source = torch.stack([tail.source for tail in tails])
        turns = torch.stack([tail.turns for tail in tails])
        begin, end = window.voiced, window.pitched
        if end == begin:
            return source, turns
        context = hift.f0_predictor.context
        final = end == mel.shape[2]
        if begin < context:  # then no frame of the part has been dropped
            f0 = hift.f0(mel, first=True, final=final)[:, begin:]
        else:
            f0 = hift.f0(mel[:, :, begin - context :], first=False, final=final)
        noises = [
            noise_from(item, (tail.first_frame + begin) * hift.samples_per_frame)
            for item, tail in zip(items, tails, strict=True)
        ]
        samples = (end - begin) * hift.samples_per_frame
        noise = source_noise(random.uniform, noises, samples, hift.m_source.waves, mel.device)
        total = hift.m_source.total(f0, turns)
        new = hift.m_source.mix(hift.m_source.sines_at(total), f0, noise)
        return torch.cat([source, new], dim=1), total[:, :, -1]

    def _wave(self, mel: Tensor, source: Tensor, window: Window, final: bool) -> Tensor:
        """Return the new samples (batch, samples)."""
        hift, done, ready = self._hift, window.done, window.ready
        if ready == done:
            return mel.new_empty(len(mel), 0)
        first = done < hift.reach.context  # then no frame of the part has been dropped
        if not first:
            mel = mel[:, :, done - hift.mel_context :]
            source = source[:, done * hift.samples_per_frame - hift.source_context :]
        wave = hift.decode(mel, source, first, final)
        return wave[:, wave.shape[1] - (ready - done) * hift.samples_per_frame :]
