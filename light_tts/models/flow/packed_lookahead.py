"""The look-ahead layer of the packed flow's encoders, over items padded to a common length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from light_tts.kernels.flow.shifted_linear import shifted_linear
from light_tts.models.flow.lookahead import PreLookaheadLayer

Weights = tuple[Tensor, Tensor]  # (in, out) or (taps, in, out), and (out,) float32


class PackedLookahead:
    """`dtype`: type of weights and activations; sums are float32."""

    def __init__(self, layer: PreLookaheadLayer, dtype: torch.dtype) -> None:
        self._ahead, self._before = (_taps(conv, dtype) for conv in (layer.conv1, layer.conv2))

    def __call__(self, x: Tensor, position: Tensor, size: int) -> Tensor:
        """x: (items * size, width); position: (items * size,) int32, negative where nothing is wanted.
        Returns (items * size, width), undefined there."""
        ahead = x.new_empty(len(x), self._ahead[0].shape[2])
        shifted_linear(x, *self._ahead, position, ahead, size, 0, "leaky_relu")
        first = 1 - len(self._before[0])
        return shifted_linear(ahead, *self._before, position, torch.empty_like(x), size, first, x)


def _taps(conv: nn.Conv1d, dtype: torch.dtype) -> Weights:
    """Return weight (taps, in, out) and bias."""
    assert conv.bias is not None
    return conv.weight.float().permute(2, 1, 0).contiguous().to(dtype), conv.bias.float()
