"""Convolutional blocks for sequences of any length, following Liu et al. 2022, "A ConvNet for the 2020s"."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.flow.masks import length_mask


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """lengths: (batch,) -> (batch, 1, frames) float32: 1 in the first `lengths` frames of each."""
    return length_mask(lengths, frames)[:, None].float()


class ConvNeXt(nn.Module):
    """Context of `kernel // 2` frames on each side. (batch, width, frames) -> the same."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (batch, 1, frames), which zeroes everything beyond the end, so that the result equals that of
        the sequence alone."""
        seen = x if mask is None else x * mask
        y = self.norm(self.depthwise(seen).transpose(1, 2))
        return x + self.narrow(F.gelu(self.widen(y))).transpose(1, 2)
