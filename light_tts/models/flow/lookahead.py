"""The look-ahead layer of the encoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.flow.masks import length_mask


class PreLookaheadLayer(nn.Module):
    """Position t depends on t-2 ... t+lookahead, zero-padded at both ends."""

    def __init__(self, width: int, channels: int, lookahead: int) -> None:
        super().__init__()
        self.lookahead = lookahead
        self.conv1 = nn.Conv1d(width, channels, kernel_size=lookahead + 1)
        self.conv2 = nn.Conv1d(channels, width, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width)"""
        return self.extend(x, x.shape[1], self.before(len(x)))[0]

    def of_batch(
        self, x: Tensor, lengths: Tensor, finalize: bool | Tensor, longest: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: (B, T, width), lengths: (B,). finalize: bool or (B,) bool, False: the last `lookahead` positions
        are only context; longest: T' or more, None: looked up, for which a GPU is waited for. Returns the
        positions that are not only context, (B, T', width), and their number (B,)."""
        x = self(x * length_mask(lengths, x.shape[1])[..., None])
        finalize = torch.as_tensor(finalize, device=lengths.device)
        lengths = torch.where(finalize, lengths, lengths - self.lookahead)
        return x[:, : int(lengths.max()) if longest is None else longest], lengths

    def before(self, batch: int) -> Tensor:
        """Return the padding before the first position: (batch, channels, 2)"""
        return self.conv2.weight.new_zeros(batch, self.conv2.in_channels, 2)

    def extend(self, x: Tensor, size: int, before: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, T, width), `size` positions and some look-ahead. Returns the result for `size` positions,
        and the inputs to keep for the following ones."""
        y = F.pad(x.transpose(1, 2), (0, size + self.lookahead - x.shape[1]))
        y = torch.cat([before, F.leaky_relu(self.conv1(y))], dim=2)
        return x[:, :size] + self.conv2(y).transpose(1, 2), y[:, :, -2:]
