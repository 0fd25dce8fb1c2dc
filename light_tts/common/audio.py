"""Reads and resamples recordings. Uses only numpy and libsndfile, so that HTTP workers can import it."""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile

from light_tts.common.file_kinds import READABLE, what_it_is

MIN_SAMPLE_RATE = 16_000
MAX_SAMPLE_RATE = 192_000
MAX_AMPLITUDE = 10.0  # full scale is 1; float files may exceed it a little, but not by this much

UNREADABLE = "audio file format is incorrect"  # start of the message about such a file

_BLOCK = 1 << 20  # values decoded at a time, over all channels
_LOWPASS_WIDTH = 6  # zero crossings on each side of the sinc
_ROLLOFF = 0.99  # cut-off as a fraction of the lower Nyquist frequency


class AudioError(ValueError):
    """The recording cannot be used; the message tells the sender why."""


def read_audio(data: bytes, min_seconds: float, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode a sound file of any format that libsndfile supports.

    Returns (samples (n,) float32 mono (mean of the channels), sample rate in Hz). Decodes at most
    `max_seconds` plus one block, whatever the file claims or expands to. Raises AudioError.
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
        raise AudioError("the audio has samples that are not finite or are far beyond full scale")
    return samples, rate


def check_length(samples: int, rate: int, min_seconds: float, max_seconds: float) -> None:
    """Raise AudioError unless `samples` at `rate` Hz last from `min_seconds` to `max_seconds`."""
    if samples > int(max_seconds * rate):
        raise AudioError(f"the audio is longer than {max_seconds:g} s")
    if samples < max(1, math.ceil(min_seconds * rate)):
        raise AudioError(f"the audio lasts {samples / rate:.2f} s; at least {min_seconds:g} s are needed")


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample `samples` (n,) float32 band-limited; return (ceil(n * new_rate / rate),) float32.

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
    """Return a Hann-windowed sinc filter with the default parameters of torchaudio's `resample`.

    Output m is at input position m * rate / new_rate. Only new_rate / gcd different fractions of it occur, so
    the filter is a table with that many rows, each only as long as the window, and coprime rates need no more
    memory. Returns the old and new rates divided by their gcd, and the table (new, 2 * width + 2) float32:
    row m % new applies to the inputs from m * old // new - width on.
    """
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    cutoff = min(old, new) * _ROLLOFF
    width = math.ceil(_LOWPASS_WIDTH * old / cutoff)
    taps = np.arange(-width, width + 2)  # input samples around the rounded-down position
    phase = np.arange(new)
    # torchaudio rounds here, which is visible in log spectra of silence
    position = (phase / new).astype(np.float32)
    t = ((phase[:, None] * old // new + taps) / old - position[:, None]) * cutoff
    window = np.where(np.abs(t) < _LOWPASS_WIDTH, np.cos(t * np.pi / (2 * _LOWPASS_WIDTH)) ** 2, 0.0)
    return old, new, (np.sinc(t) * window * (cutoff / old)).astype(np.float32)
