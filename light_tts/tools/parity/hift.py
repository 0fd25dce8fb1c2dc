"""The vocoder: pitch, source, the components of the decoder and the whole, all with the noise of the goldens.
For a causal vocoder also the sections that are not final, and a stream of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from light_tts.models.checkpoint.cosyvoice3_config import Config3
from light_tts.models.vocoder.causal_hift import CausalHift
from light_tts.models.vocoder.causal_stream import TorchCausalVocoder
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.interface import CausalItem, CausalState
from light_tts.models.vocoder.source import SourceModule
from light_tts.tools.parity import Check, Comparison, Golden

FILE = "hift.npz"
CHUNK = 7  # mel frames


@dataclass(frozen=True)
class Whole:
    """The functions of a vocoder for one item and the whole of its mel. noise: name of the golden noise."""

    noise: str
    source: SourceModule
    f0: Callable[[Tensor], Tensor]
    conv_pre: Callable[[Tensor], Tensor]
    spectrum: Callable[[Tensor], Tensor]
    istft: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]
    inference: Callable[[Tensor], tuple[Tensor, Tensor]]


def parts(golden: Golden) -> Iterator[Comparison]:
    hift = _whole(golden)
    mel, f0 = golden.tensor(FILE, "mel"), golden.tensor(FILE, "f0_in")
    yield Comparison("f0", hift.f0(mel), golden.tensor(FILE, "f0"), 5e-3)

    sines, uv = golden.tensor(FILE, "sines_noise0"), golden.tensor(FILE, "uv")
    yield Comparison("source.sines", hift.source.sines(f0)[:, : sines.shape[1]], sines, 1e-5)
    yield Comparison("source.voiced", hift.source.voiced(f0), uv)
    source = golden.tensor(FILE, "source_noise0")[:, 0]
    yield Comparison("source.silent_noise", hift.source(f0, None), source, 1e-5)
    noisy, given = golden.tensor(FILE, "source_fixed_noise")[:, 0], golden.tensor(FILE, hift.noise)
    noise = torch.zeros(1, source.shape[1], given.shape[2])
    noise[:, : given.shape[1]] = given
    yield Comparison("source.given_noise", hift.source(f0, noise)[:, : noisy.shape[1]], noisy, 1e-5)

    real, imag = golden.tensor(FILE, "stft_real"), golden.tensor(FILE, "stft_imag")
    spectrum = hift.spectrum(source)[:, :, : real.shape[2]]
    yield Comparison("source.spectrum", spectrum, torch.cat([real, imag], dim=1), 1e-4)
    yield Comparison("conv_pre", hift.conv_pre(mel), golden.tensor(FILE, "conv_pre"), 1e-4)
    magnitude, phase = golden.tensor(FILE, "istft_mag"), golden.tensor(FILE, "istft_phase")
    yield Comparison("istft", hift.istft(magnitude, phase), golden.tensor(FILE, "istft_out"), 1e-4)
    yield Comparison("decode", hift.decode(mel, source), golden.tensor(FILE, "wav_from_source"), 1e-4)


def whole(golden: Golden) -> Iterator[Comparison]:
    wave, source = _whole(golden).inference(golden.tensor(FILE, "mel"))
    yield Comparison("inference", wave, golden.tensor(FILE, "inference_noise0_wav"), 5e-3)
    yield Comparison("inference.source", source, golden.tensor(FILE, "inference_noise0_source")[:, 0], 1e-2)


def cached_source(golden: Golden) -> Iterator[Comparison]:
    if not _is_causal(golden):
        hift = Hift.from_checkpoint(golden.checkpoint, golden.config, "cpu")
        mel, cached = golden.tensor(FILE, "mel"), golden.tensor(FILE, "cache_source").flatten()
        wave, _ = hift.inference(mel, [mel.shape[2]], [cached])
        expected = golden.tensor(FILE, "inference_cached_wav")
        yield Comparison("inference.cached_source", wave, expected, 5e-3)


def not_final(golden: Golden) -> Iterator[Comparison]:
    if _is_causal(golden):
        hift, mel = _causal(golden), golden.tensor(FILE, "mel")
        pitch = hift.f0(mel, final=False)
        yield Comparison("f0.not_final", pitch, golden.tensor(FILE, "f0_partial"), 5e-3)
        frames = pitch.shape[1]
        source = golden.tensor(FILE, "source_noise0")[:, 0, : frames * hift.samples_per_frame]
        wave = hift.decode(mel[:, :, :frames], source, final=False)
        yield Comparison("decode.not_final", wave, golden.tensor(FILE, "wav_from_source_partial"), 1e-4)
        wave, _ = hift.inference(mel, final=False)
        expected = golden.tensor(FILE, "inference_noise0_partial_wav")
        yield Comparison("inference.not_final", wave, expected, 5e-3)


def chunks(golden: Golden) -> Iterator[Comparison]:
    if _is_causal(golden):
        vocoder = TorchCausalVocoder(_causal(golden), batched=False)
        state: CausalState | None = None
        pieces = golden.tensor(FILE, "mel")[0].split(CHUNK, dim=1)
        waves = []
        for number, mel in enumerate(pieces, start=1):
            item = CausalItem(mel, state, final=number == len(pieces), noise=None)
            [(wave, state)] = vocoder.speak([item])
            waves.append(wave)
        expected = golden.tensor(FILE, "inference_noise0_wav")
        yield Comparison("inference.chunks", torch.cat(waves)[None], expected, 5e-3)


def _whole(golden: Golden) -> Whole:
    if _is_causal(golden):
        causal = _causal(golden)
        look_right = causal.config.conv_pre_look_right
        return Whole(
            noise="uniform_noise",
            source=causal.m_source,
            f0=causal.f0,
            conv_pre=lambda mel: causal.conv_pre(F.pad(mel, (0, look_right))),
            spectrum=causal.source_spectrum,
            istft=causal.transform.inverse,
            decode=causal.decode,
            inference=causal.inference,
        )
    hift = Hift.from_checkpoint(golden.checkpoint, golden.config, "cpu")
    return Whole(
        noise="gauss_noise",
        source=hift.m_source,
        f0=lambda mel: hift.f0(mel, [mel.shape[2]]),
        conv_pre=hift.conv_pre,
        spectrum=lambda source: hift.source_spectrum(source, [source.shape[1] // hift.samples_per_frame]),
        istft=lambda magnitude, phase: hift.istft(magnitude, phase, [magnitude.shape[2]]),
        decode=lambda mel, source: hift.decode(mel, source, [mel.shape[2]]),
        inference=lambda mel: hift.inference(mel, [mel.shape[2]]),
    )


def _is_causal(golden: Golden) -> bool:
    return isinstance(golden.config, Config3)


def _causal(golden: Golden) -> CausalHift:
    return CausalHift.from_checkpoint(golden.checkpoint, golden.config, "cpu")


CHECKS: list[Check] = [parts, whole, cached_source, not_final, chunks]
