"""Spectral distances between waveforms, and the spectra themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.models.checkpoint.config import MelConfig
from light_tts.models.frontend.features import flow_mels

# Window size in samples and number of mel bands: long windows resolve harmonics, short ones time.
MEL_SCALES = ((2048, 160), (1024, 80), (512, 40), (256, 20), (128, 10))
STFT_SIZES = (2048, 1024, 512)
# lower limit of magnitudes before the logarithm: about the noise of 16 bits, for unit-energy windows
FLOOR = 1e-4


def magnitudes(wave: Tensor, size: int) -> Tensor:
    """wave: (batch, samples) -> (batch, size // 2 + 1, frames) float32, of Hann windows of unit energy, four
    per length `size`. The gradient is finite in silence."""
    window = torch.hann_window(size, device=wave.device)
    spectrum = torch.stft(
        wave.float(), size, size // 4, window=window / window.norm(), pad_mode="reflect", return_complex=True
    )
    return (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


def mel_distance(wave: Tensor, target: Tensor, rate: int) -> Tensor:
    """Return the mean difference of log mel spectrograms at several resolutions, as in Kumar et al.,
    "High-fidelity audio compression with improved RVQGAN" (2023). wave, target: (batch, samples) at `rate` Hz
    -> ()"""
    total = wave.new_zeros(())
    for size, bands in MEL_SCALES:
        scale = MelConfig(size, bands, rate, size // 4, size, 0.0, None)
        total = total + F.l1_loss(flow_mels(wave, scale), flow_mels(target, scale))
    return total / len(MEL_SCALES)


def stft_distance(wave: Tensor, target: Tensor) -> Tensor:
    """Return spectral convergence plus log-magnitude distance, Yamamoto et al., "Parallel WaveGAN" (2020).
    wave, target: (batch, samples) -> ()"""
    total = wave.new_zeros(())
    for size in STFT_SIZES:
        made, wanted = magnitudes(wave, size), magnitudes(target, size)
        convergence = (made - wanted).norm() / (wanted.norm() + FLOOR)
        total = total + convergence + F.l1_loss((made + FLOOR).log(), (wanted + FLOOR).log())
    return total / len(STFT_SIZES)
