"""Mel spectrograms aligned with speech tokens: a fixed number of frames per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from light_tts.models.checkpoint.cosyvoice2_config import Config
from light_tts.models.frontend.features import flow_mels
from training.corpus.corpus import Corpus

MELS_AT_ONCE = 64


def token_mel(wave: Tensor, tokens: int, config: Config) -> Tensor:
    """wave: (samples,) float32 -> mel (tokens, frames per token, mels), with the number of tokens that both
    have."""
    ratio = config.token_mel_ratio
    mel = flow_mels(wave[None], config.mel)[0].T  # (frames, mels)
    tokens = min(tokens, len(mel) // ratio)
    return mel[: tokens * ratio].unflatten(0, (tokens, ratio))


def token_mels(corpus: Corpus, numbers: Sequence[int], tokens: Sequence[int], config: Config) -> list[Tensor]:
    """`token_mel` in half precision for these utterances of the corpus, computed in batches."""
    samples = corpus.samples.tolist()
    mels: dict[int, Tensor] = {}
    order = sorted(range(len(numbers)), key=lambda row: samples[numbers[row]])
    for begin in range(0, len(order), MELS_AT_ONCE):
        rows = order[begin : begin + MELS_AT_ONCE]
        index = torch.tensor([numbers[row] for row in rows], device=corpus.device)
        size = corpus.samples[index][:, None]
        # Each is reflected at its own end, as far as a frame extends.
        longest = samples[numbers[rows[-1]]] + config.mel.n_fft
        place = torch.arange(longest, device=corpus.device)
        place = torch.where(place < size, place, 2 * (size - 1) - place).clamp(min=0)
        wave = corpus.wave[corpus.start[index][:, None] + place].float() / 32768
        mel = flow_mels(wave, config.mel).transpose(1, 2).half()
        for one, row in zip(mel, rows, strict=True):
            frames = samples[numbers[row]] // config.mel.hop_size
            count = min(tokens[row], frames // config.token_mel_ratio)
            mels[row] = one[: count * config.token_mel_ratio].unflatten(0, (count, -1)).clone()
    return [mels[row] for row in range(len(numbers))]
