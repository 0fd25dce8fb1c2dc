"""The vocoder: pitch, source, the components of the decoder and the whole, all with the noise of the
goldens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from light_tts.models.vocoder.hift import Hift
from light_tts.tools.parity import Check, Comparison, Golden

FILE = "hift.npz"


def parts(golden: Golden) -> Iterator[Comparison]:
    hift = Hift.from_checkpoint(golden.checkpoint, golden.config, "cpu")
    mel, f0 = golden.tensor(FILE, "mel"), golden.tensor(FILE, "f0_in")
    lengths = [mel.shape[2]]
    yield Comparison("f0", hift.f0(mel, lengths), golden.tensor(FILE, "f0"), 5e-3)

    sines, uv = golden.tensor(FILE, "sines_noise0"), golden.tensor(FILE, "uv")
    yield Comparison("source.sines", hift.m_source.sines(f0)[:, : sines.shape[1]], sines, 1e-5)
    yield Comparison("source.voiced", hift.m_source.voiced(f0), uv)
    source = golden.tensor(FILE, "source_noise0")[:, 0]
    yield Comparison("source.silent_noise", hift.m_source(f0, None), source, 1e-5)
    noisy, given = golden.tensor(FILE, "source_fixed_noise")[:, 0], golden.tensor(FILE, "gauss_noise")
    noise = torch.zeros(1, source.shape[1], given.shape[2])
    noise[:, : given.shape[1]] = given
    yield Comparison("source.given_noise", hift.m_source(f0, noise)[:, : noisy.shape[1]], noisy, 1e-5)

    real, imag = golden.tensor(FILE, "stft_real"), golden.tensor(FILE, "stft_imag")
    spectrum = hift.source_spectrum(source, lengths)[:, :, : real.shape[2]]
    yield Comparison("source.spectrum", spectrum, torch.cat([real, imag], dim=1), 1e-4)
    yield Comparison("conv_pre", hift.conv_pre(mel), golden.tensor(FILE, "conv_pre"), 1e-4)
    magnitude, phase = golden.tensor(FILE, "istft_mag"), golden.tensor(FILE, "istft_phase")
    wave = golden.tensor(FILE, "istft_out")
    yield Comparison("istft", hift.istft(magnitude, phase, [magnitude.shape[2]]), wave, 1e-4)
    yield Comparison(
        "decode", hift.decode(mel, source, lengths), golden.tensor(FILE, "wav_from_source"), 1e-4
    )


def whole(golden: Golden) -> Iterator[Comparison]:
    hift = Hift.from_checkpoint(golden.checkpoint, golden.config, "cpu")
    mel = golden.tensor(FILE, "mel")
    lengths = [mel.shape[2]]
    wave, source = hift.inference(mel, lengths)
    yield Comparison("inference", wave, golden.tensor(FILE, "inference_noise0_wav"), 5e-3)
    yield Comparison("inference.source", source, golden.tensor(FILE, "inference_noise0_source")[:, 0], 1e-2)
    wave, _ = hift.inference(mel, lengths, [golden.tensor(FILE, "cache_source").flatten()])
    yield Comparison("inference.cached_source", wave, golden.tensor(FILE, "inference_cached_wav"), 5e-3)


CHECKS: list[Check] = [parts, whole]
