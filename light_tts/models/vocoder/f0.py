"""The pitch predictor of the vocoder: five convolutions over the mel spectrogram (ConvRNNF0Predictor)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

LAYERS = 5


class F0Predictor(nn.Module):
    """Parameter names are the checkpoint's: `condnet.0,2,4,6,8` (with activations in between),
    `classifier`.
    """

    def __init__(self, in_channels: int, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(LAYERS):
            layers += [
                weight_norm(nn.Conv1d(channels if index else in_channels, channels, 3, padding=1)),
                nn.ELU(),
            ]
        self.condnet: Any = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """mel: (batch, in_channels, frames), zero in the padding; mask: (batch, 1, frames), None: no padding
        -> pitch in Hz (batch, frames), zero in the padding."""
        x = mel
        for conv in self.condnet[::2]:
            x = F.elu(conv(x))
            if mask is not None:
                x = x * mask
        f0 = torch.abs(self.classifier(x.transpose(1, 2)).squeeze(-1))
        return f0 if mask is None else f0 * mask.squeeze(1)
