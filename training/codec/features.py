"""Features of batches on the device, equal to what `light_tts` computes for one recording on the CPU."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.common.audio import resampling_filter
from light_tts.models.frontend.features import SPEECH_RATE

FBANK_MELS, FBANK_SAMPLES, FBANK_HOP, FBANK_FFT = 80, 400, 160, 512
FBANK_LOWEST, FBANK_FLOOR, PRE_EMPHASIS = 20.0, 1.1920929e-07, 0.97


@lru_cache
def _resampling_kernel(rate: int, new_rate: int, device: torch.device) -> tuple[Tensor, int, int, int]:
    """Return the filter's rows, each shifted to the position of its output: (new, 1, taps), both rates, and
    the number of preceding inputs that an output depends on."""
    old, new, table = resampling_filter(rate, new_rate)
    shifts = [phase * old // new for phase in range(new)]
    kernel = torch.zeros(new, 1, table.shape[1] + shifts[-1])
    for phase, shift in enumerate(shifts):
        kernel[phase, 0, shift : shift + table.shape[1]] = torch.from_numpy(table[phase])
    return kernel.to(device), old, new, (table.shape[1] - 2) // 2


def resample(signal: Tensor, rate: int, new_rate: int = SPEECH_RATE) -> Tensor:
    """signal: (batch, n) -> (batch, ceil(n * new_rate / rate)), like `light_tts.common.audio.resample`."""
    kernel, old, new, width = _resampling_kernel(rate, new_rate, signal.device)
    length = -(-signal.shape[1] * new // old)
    steps = -(-length // new)
    missing = max(0, (steps - 1) * old + kernel.shape[2] - width - signal.shape[1])
    padded = F.pad(signal[:, None], (width, missing))
    return F.conv1d(padded, kernel, stride=old)[:, :, :steps].transpose(1, 2).flatten(1)[:, :length]


@lru_cache
def _fbank_filters(device: torch.device) -> Tensor:
    """Return Kaldi's triangular filters, linear on its mel scale: (bins, mels)."""

    def scale(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log(1.0 + hertz / 700.0)

    low, high = scale(torch.tensor([FBANK_LOWEST, SPEECH_RATE / 2], dtype=torch.float64))
    edges = low + (high - low) / (FBANK_MELS + 1) * torch.arange(FBANK_MELS + 2, dtype=torch.float64)
    bins = scale(torch.arange(FBANK_FFT // 2 + 1, dtype=torch.float64) * SPEECH_RATE / FBANK_FFT)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float().to(device)


def fbanks(signal: Tensor) -> Tensor:
    """Return Kaldi's log filter banks before mean subtraction (which `kaldi_fbank` includes). signal: (batch,
    n) at 16 kHz -> (batch, 1 + (n - 400) // 160, 80)"""
    frames = signal.unfold(1, FBANK_SAMPLES, FBANK_HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    window = torch.hann_window(FBANK_SAMPLES, periodic=False, device=signal.device) ** 0.85  # Povey's
    spectrum = torch.fft.rfft((frames - PRE_EMPHASIS * before) * window, n=FBANK_FFT)
    power = spectrum.real**2 + spectrum.imag**2
    return (power @ _fbank_filters(signal.device)).clamp(min=FBANK_FLOOR).log()
