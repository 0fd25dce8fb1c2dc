"""The pitch predictors of the vocoders: five convolutions over the mel spectrogram."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

KERNELS = (3, 3, 3, 3, 3)
CAUSAL_KERNELS = (4, 3, 3, 3, 3)


class _PitchNetwork(nn.Module):
    """Parameter names are the checkpoint's: `condnet.0,2,4,6,8` (with activations in between),
    `classifier`.
    """

    def __init__(
        self, in_channels: int, channels: int, classes: int, kernels: tuple[int, ...], padding: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, kernel in enumerate(kernels):
            inputs = channels if index else in_channels
            layers += [weight_norm(nn.Conv1d(inputs, channels, kernel, padding=padding)), nn.ELU()]
        self.condnet: Any = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def pitch(self, x: Tensor) -> Tensor:
        """x: (batch, channels, frames) after the convolutions -> Hz (batch, frames)."""
        return torch.abs(self.classifier(x.transpose(1, 2)).squeeze(-1))


class F0Predictor(_PitchNetwork):
    """ConvRNNF0Predictor."""

    def __init__(self, in_channels: int, channels: int, classes: int) -> None:
        super().__init__(in_channels, channels, classes, KERNELS, padding=1)

    def forward(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """mel: (batch, in_channels, frames), zero in the padding; mask: (batch, 1, frames), None: no padding
        -> pitch in Hz (batch, frames), zero in the padding."""
        x = mel
        for conv in self.condnet[::2]:
            x = F.elu(conv(x))
            if mask is not None:
                x = x * mask
        f0 = self.pitch(x)
        return f0 if mask is None else f0 * mask.squeeze(1)


class CausalF0Predictor(_PitchNetwork):
    """CausalConvRNNF0Predictor: the first convolution sees `lookahead` frames after a frame, all of them
    together `context` frames before it."""

    def __init__(self, in_channels: int, channels: int, classes: int) -> None:
        super().__init__(in_channels, channels, classes, CAUSAL_KERNELS, padding=0)
        self.lookahead = CAUSAL_KERNELS[0] - 1
        self.context = sum(kernel - 1 for kernel in CAUSAL_KERNELS[1:])

    def forward(self, mel: Tensor, first: bool, final: bool) -> Tensor:
        """mel: (batch, in_channels, frames); first: it starts with the first frame of a part; final: it ends
        with the last -> pitch in Hz (batch, frames), without the first `context` frames if it is not the
        first, and without the last `lookahead` frames if it is not final."""
        x = F.pad(mel, (0, self.lookahead)) if final else mel
        for index, conv in enumerate(self.condnet[::2]):
            if first and index:
                x = F.pad(x, (conv.kernel_size[0] - 1, 0))
            x = F.elu(conv(x))
        return self.pitch(x)
