"""Spectral features of a recording, one kind for each model that takes them."""

from __future__ import annotations

from functools import lru_cache

import kaldi_native_fbank
import numpy as np
import torch
from torch import Tensor

from light_tts.models.checkpoint.config import MelConfig

SPEECH_RATE = 16_000  # Hz; input rate of the speech tokenizer and the speaker encoder

_WHISPER_N_FFT = 400
_WHISPER_HOP = 160
_WHISPER_MELS = 128


@lru_cache
def _mel_filters(rate: int, n_fft: int, mels: int, fmin: float, fmax: float, device: torch.device) -> Tensor:
    """Return `mel_filters` as float32 on a device."""
    return torch.from_numpy(mel_filters(rate, n_fft, mels, fmin, fmax).astype(np.float32)).to(device)


def mel_filters(rate: int, n_fft: int, mels: int, fmin: float, fmax: float) -> np.ndarray:
    """Return triangular filters (mels, n_fft // 2 + 1) float64 on the scale and with the norm of Slaney
    (librosa's default). Each extends from the centre of its lower to that of its upper neighbour; its area is
    1 Hz."""
    low, high = _slaney_mel(fmin), _slaney_mel(fmax)
    centres = _slaney_hertz(np.linspace(low, high, mels + 2))[:, None]
    bins = np.linspace(0, rate // 2, n_fft // 2 + 1)
    widths = np.diff(centres, axis=0)
    rising = -(centres[:-2] - bins) / widths[:-1]
    falling = (centres[2:] - bins) / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (centres[2:] - centres[:-2]))


# Slaney's mel scale is linear up to 1000 Hz, or 15 mel, and logarithmic above.
_LINEAR_HERTZ, _LINEAR_MELS = 1000.0, 15.0
_MELS_PER_E = 27.0 / np.log(6.4)


def _slaney_mel(hertz: float) -> float:
    if hertz < _LINEAR_HERTZ:
        return 3.0 * hertz / 200.0
    return _LINEAR_MELS + np.log(hertz / _LINEAR_HERTZ) * _MELS_PER_E


def _slaney_hertz(mels: np.ndarray) -> np.ndarray:
    above = _LINEAR_HERTZ * np.exp(np.log(6.4) / 27.0 * (np.maximum(mels, _LINEAR_MELS) - _LINEAR_MELS))
    return np.where(mels < _LINEAR_MELS, 200.0 * mels / 3.0, above)


def whisper_log_mel(samples: np.ndarray) -> np.ndarray:
    """Input of the speech tokenizer. samples: (n,) float32 at 16 kHz. Returns (128, n // 160) float32."""
    return whisper_log_mels(torch.from_numpy(samples)[None])[0].numpy()


def whisper_log_mels(signal: Tensor) -> Tensor:
    """Whisper's log-mel spectrogram without padding to 30 s. signal: (batch, n) at 16 kHz -> (batch, 128, n
    // 160)"""
    window = torch.hann_window(_WHISPER_N_FFT, device=signal.device)
    spectrum = torch.stft(signal, _WHISPER_N_FFT, _WHISPER_HOP, window=window, return_complex=True)
    power = spectrum[..., :-1].abs() ** 2
    filters = _mel_filters(SPEECH_RATE, _WHISPER_N_FFT, _WHISPER_MELS, 0.0, SPEECH_RATE / 2, signal.device)
    log_mel = (filters @ power).clamp(min=1e-10).log10()
    log_mel = torch.maximum(log_mel, log_mel.amax((1, 2), keepdim=True) - 8.0)
    return (log_mel + 4.0) / 4.0


def kaldi_fbank(samples: np.ndarray) -> np.ndarray:
    """Input of the speaker encoder: Kaldi's log filter banks minus their mean over time.

    samples: (n,) float32 at 16 kHz, full scale 1. Returns (1 + (n - 400) // 160, 80) float32.
    """
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SPEECH_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = 80
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(SPEECH_RATE, samples)
    fbank.input_finished()
    frames = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
    return frames - frames.mean(axis=0, keepdims=True)


def flow_mel(samples: np.ndarray, config: MelConfig) -> np.ndarray:
    """Prompt mel spectrogram of the flow.

    samples: (n,) float32 at config.sampling_rate. Returns (n // hop_size, num_mels) float32, natural log.
    Computed in float64: where there is no energy, the rounding of a transform in float32, which depends on
    the processor, changes the logarithm by up to 2e-3.
    """
    return flow_mels(torch.from_numpy(samples)[None].double(), config)[0].T.float().contiguous().numpy()


def flow_mels(signal: Tensor, config: MelConfig) -> Tensor:
    """The same for a batch. signal: (batch, n) -> (batch, num_mels, n // hop_size)"""
    padding = (config.n_fft - config.hop_size) // 2
    spectrum = torch.stft(
        torch.nn.functional.pad(signal, (padding, padding), mode="reflect"),
        config.n_fft,
        config.hop_size,
        config.win_size,
        window=torch.hann_window(config.win_size, device=signal.device).to(signal.dtype),
        center=False,
        return_complex=True,
    )
    magnitude = (spectrum.real**2 + spectrum.imag**2 + 1e-9).sqrt()
    fmax = config.sampling_rate / 2 if config.fmax is None else config.fmax
    filters = _mel_filters(
        config.sampling_rate, config.n_fft, config.num_mels, config.fmin, fmax, signal.device
    )
    return (filters.to(signal.dtype) @ magnitude).clamp(min=1e-5).log()
