"""Simulates recordings of the teacher's speech with a microphone in a room, to resemble prompts from real
users.

Reverberation is exponentially decaying noise after the direct sound; background noise has a falling spectrum,
as is typical of rooms.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.corpus.corpus import SAMPLE_RATE

PAUSE, PAUSED = 0.7, 0.5  # maximum seconds before and after each; fraction of recordings
REVERBERANT = 0.6  # fraction of recordings
DECAY = (0.1, 0.6)  # seconds until the reverberation has decayed by 60 dB
DIRECT = (-2.0, 14.0)  # direct-to-reverberant ratio in dB
FIRST_ECHO = 0.003  # seconds
NOISY, SNR, FALL = 0.8, (12.0, 45.0), (0.0, 2.0)  # fraction; dB; power falls with this power of the frequency
DULL, LOW_PASS = 0.4, (3500.0, 9000.0)  # fraction; Hz
THIN, HIGH_PASS = 0.4, (50.0, 300.0)
TILT = 1.5  # dB per octave, up or down
PEAK = (0.05, 0.95)
TRANSFORMED = 16384  # samples; lengths are multiples of it, so that few transform sizes are needed


def in_a_room(wave: Tensor, random: np.random.Generator) -> Tensor:
    """wave: (samples,) float32 at SAMPLE_RATE -> (at least as many samples,), another recording of it. The
    same numbers from `random` give the same recording."""
    pauses = random.uniform(0, PAUSE, 2) * SAMPLE_RATE * (random.random() < PAUSED)
    wave = F.pad(wave, [int(samples) for samples in pauses])
    echoes = _echoes(random)
    size = -(-(len(wave) + len(echoes)) // TRANSFORMED) * TRANSFORMED
    frequency = torch.linspace(0, SAMPLE_RATE / 2, size // 2 + 1, device=wave.device)
    spectrum = torch.fft.rfft(wave, size) * torch.fft.rfft(echoes.to(wave.device), size)
    if random.random() < NOISY:
        white = torch.from_numpy(random.standard_normal(size, np.float32)).to(wave.device)
        fall = frequency.clamp(min=50.0) ** (-0.5 * random.uniform(*FALL))
        noise = torch.fft.irfft(torch.fft.rfft(white) * fall, size)
        level = 10 ** (-random.uniform(*SNR) / 20) * wave.square().mean().sqrt()
        spectrum = spectrum + torch.fft.rfft(noise * level / noise.square().mean().sqrt())
    heard = torch.fft.irfft(spectrum * _response(frequency, random), size)[: len(wave)]
    low, high = np.log(PEAK)
    return heard * float(np.exp(random.uniform(low, high))) / heard.abs().max().clamp(min=1e-5)


def _echoes(random: np.random.Generator) -> Tensor:
    """Return the impulse response of the room: (samples,)."""
    decay, direct, reverberant = random.uniform(*DECAY), random.uniform(*DIRECT), random.random()
    time = np.arange(int(DECAY[1] * SAMPLE_RATE)) / SAMPLE_RATE
    tail = random.standard_normal(len(time)) * 10 ** (-3 * time / decay) * (time > FIRST_ECHO)
    tail *= 10 ** (-direct / 20) / np.linalg.norm(tail)
    if reverberant >= REVERBERANT:
        tail[:] = 0
    tail[0] = 1.0
    return torch.from_numpy(tail.astype(np.float32))


def _response(frequency: Tensor, random: np.random.Generator) -> Tensor:
    """Return the frequency response of the recording equipment: (n,) -> (n,)"""
    octaves = (frequency.clamp(min=100.0) / 1000.0).log2()
    response = 10 ** (random.uniform(-TILT, TILT) * octaves / 20)
    low_pass, high_pass = (np.exp(random.uniform(*np.log(band))) for band in (LOW_PASS, HIGH_PASS))
    if random.random() < DULL:
        response = response / (1 + (frequency / low_pass) ** 12).sqrt()
    if random.random() < THIN:
        response = response / (1 + (high_pass / frequency.clamp(min=1.0)) ** 4).sqrt()
    return response
