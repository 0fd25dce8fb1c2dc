"""Reading and resampling recordings. numpy and libsndfile only, so that HTTP workers can import it."""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile

from light_tts.common.file_kinds import READABLE, what_it_is

MIN_SAMPLE_RATE = 16_000
MAX_SAMPLE_RATE = 192_000
MAX_AMPLITUDE = 10.0  # full scale is 1; float files may overshoot a little, but not by this much

UNREADABLE = "audio file format is incorrect"  # how the message about such a file begins

_BLOCK = 1 << 20  # values decoded at a time, all channels together
_LOWPASS_WIDTH = 6  # zero crossings on each side of the sinc
_ROLLOFF = 0.99  # cut-off as a share of the lower Nyquist frequency


class AudioError(ValueError):
    """The recording cannot be used; the message says why, for the person who sent it."""


def read_audio(data: bytes, min_seconds: float, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode a sound file of any format that libsndfile knows.

    Returns (samples (n,) float32 mono (mean of the channels), sample rate in Hz). Never decodes more than
    `max_seconds` and one block, whatever the file claims or unpacks to. Raises AudioError.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
                raise AudioError(
                    f"the sample rate is {rate} Hz; {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz can be used"
                )
            limit = int(max_seconds * rate)
            blocks, length = [], 0
            while length <= limit:
                wanted = min(limit + 1 - length, max(1, _BLOCK // file.channels))
                block = file.read(wanted, dtype="float32", always_2d=True)
                if len(block) == 0:
                    break
                blocks.append(block.mean(axis=1))
                length += len(block)
    except AudioError:
        raise
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise AudioError(f"{UNREADABLE}: {READABLE} can be read, this is {what_it_is(data)}") from error
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    check_length(len(samples), rate, min_seconds, max_seconds)
    if not np.abs(samples).max() <= MAX_AMPLITUDE:  # also catches NaN
        raise AudioError("the audio has samples that are not finite or far beyond full scale")
    return samples, rate


def check_length(samples: int, rate: int, min_seconds: float, max_seconds: float) -> None:
    """Raise AudioError unless `samples` at `rate` Hz last from `min_seconds` to `max_seconds`."""
    if samples > int(max_seconds * rate):
        raise AudioError(f"the audio is longer than {max_seconds:g} s")
    if samples < max(1, math.ceil(min_seconds * rate)):
        raise AudioError(f"the audio lasts {samples / rate:.2f} s; at least {min_seconds:g} s are needed")


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Band-limited resampling of `samples` (n,) float32; returns (ceil(n * new_rate / rate),) float32.

    See `resampling_filter`.
    """
    if rate == new_rate:
        return samples
    old, new, table = resampling_filter(rate, new_rate)
    width = (table.shape[1] - 2) // 2
    padded = np.pad(samples, (width, width + 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, table.shape[1])
    length = -(-len(samples) * new // old)
    out = np.empty(length, np.float32)
    step = max(1, _BLOCK // table.shape[1])
    for start in range(0, length, step):
        m = np.arange(start, min(start + step, length))
        out[m] = np.einsum("mk,mk->m", windows[m * old // new], table[m % new], dtype=np.float64)
    return out


def resampling_filter(rate: int, new_rate: int) -> tuple[int, int, np.ndarray]:
    """A Hann-windowed sinc with the default parameters of torchaudio's `resample`.

    Output m lies at input position m * rate / new_rate; only new_rate / gcd different fractions of it occur,
    so the filter is a table of that many rows, each as short as the window (rates without a common factor
    cost no more memory). Returns both rates without their common factor, old and new, and the table (new,
    2 * width + 2) float32: row m % new is for the inputs from m * old // new - width on.
    """
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    cutoff = min(old, new) * _ROLLOFF
    width = math.ceil(_LOWPASS_WIDTH * old / cutoff)
    taps = np.arange(-width, width + 2)  # input samples around the floor of the position
    phase = np.arange(new)
    position = (phase / new).astype(np.float32)  # torchaudio rounds here; log spectra of silence show it
    t = ((phase[:, None] * old // new + taps) / old - position[:, None]) * cutoff
    window = np.where(np.abs(t) < _LOWPASS_WIDTH, np.cos(t * np.pi / (2 * _LOWPASS_WIDTH)) ** 2, 0.0)
    return old, new, (np.sinc(t) * window * (cutoff / old)).astype(np.float32)
