"""The short-time Fourier transform of the vocoder's source, and its inverse for the predicted spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_MAGNITUDE = 100.0


@dataclass(frozen=True)
class Transform:
    """Windows of `n_fft` samples (periodic Hann), one every `hop` samples."""

    n_fft: int
    hop: int

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1

    def forward(self, signal: Tensor) -> Tensor:
        """signal: (batch, samples), where the first window starts at the first sample -> real and imaginary
        parts (batch, 2 * bins, frames) of the windows that end within it."""
        spectrum = torch.stft(
            signal,
            self.n_fft,
            self.hop,
            window=self._window(signal),
            center=False,
            return_complex=True,
        )
        return torch.cat([spectrum.real, spectrum.imag], dim=1)

    def inverse(self, magnitude: Tensor, phase: Tensor, mask: Tensor | None = None) -> Tensor:
        """magnitude, phase: (batch, bins, frames); mask: (batch, 1, frames), 0 for frames that do not count,
        None: all do -> waveform (batch, samples) from the centre of the first frame to that of the last: the
        overlap-add of windowed frames divided by that of the squared window."""
        window = self._window(magnitude)[:, None]
        spectrum = torch.polar(magnitude.clamp(max=MAX_MAGNITUDE), phase)
        pieces = torch.fft.irfft(spectrum, n=self.n_fft, dim=1) * window
        weights = (window * window).expand_as(pieces if mask is not None else pieces[:1])
        samples = (pieces.shape[2] - 1) * self.hop

        def overlap_add(pieces: Tensor) -> Tensor:
            total = F.fold(
                pieces if mask is None else pieces * mask,
                (1, samples + self.n_fft),
                (1, self.n_fft),
                stride=(1, self.hop),
            )
            return total.flatten(1)[:, self.n_fft // 2 : self.n_fft // 2 + samples]

        return overlap_add(pieces) / overlap_add(weights).clamp(min=1e-11)

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.n_fft, device=like.device)
