import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from light_tts.common.audio import AudioError, read_audio, resample


def sound(samples, rate=16_000, format="WAV", subtype=None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def tone(seconds: float, rate: int = 16_000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


def test_reading_audio_needs_no_torch():
    code = "import sys, light_tts.common.audio; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
def test_channels_are_averaged(format):
    stereo = np.stack([tone(1), np.zeros(16_000)], axis=1)
    samples, rate = read_audio(sound(stereo, format=format), 0.5, 30)
    assert rate == 16_000 and samples.dtype == np.float32 and samples.shape == (16_000,)
    assert np.abs(samples - tone(1) / 2).max() < 0.05


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "format"),
        (b"not audio", "format"),
        (sound(tone(1))[:30], "format|at least"),
        (sound(tone(1), rate=8_000), "8000 Hz"),
        (sound(tone(1), rate=400_000), "400000 Hz"),
        (sound(tone(0.4)), "at least 0.5 s"),
        (sound(np.zeros(0)), "at least 0.5 s"),
        (sound(tone(2.1)), "longer than 2 s"),
        (sound(np.full(16_000, np.nan), subtype="FLOAT"), "not finite"),
        (sound(np.full(16_000, 1e30), subtype="FLOAT"), "full scale"),
    ],
    ids=["empty", "text", "cut", "8 kHz", "400 kHz", "short", "no samples", "long", "NaN", "loud"],
)
def test_unusable_recordings_are_refused_with_the_reason(data, reason):
    with pytest.raises(AudioError, match=reason):
        read_audio(data, 0.5, 2)


def test_a_small_file_that_unpacks_to_hours_is_refused_early():
    silence = sound(np.zeros((16_000 * 60 * 20, 2), np.int16), format="FLAC")
    assert len(silence) < 1_000_000
    with pytest.raises(AudioError, match="longer than 30 s"):
        read_audio(silence, 0.5, 30)


@pytest.mark.parametrize("length", [2.0, 2.0001])
def test_the_longest_prompt_is_exactly_the_limit(length):
    data = sound(tone(length))
    if length == 2.0:
        assert len(read_audio(data, 0.5, 2)[0]) == 32_000
    else:
        with pytest.raises(AudioError):
            read_audio(data, 0.5, 2)


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(44_100, 16_000), (48_000, 24_000), (16_000, 24_000), (22_051, 16_000)]
)
def test_resampling_keeps_a_tone(rate, new_rate):
    got = resample(tone(1, rate).astype(np.float32), rate, new_rate)
    assert got.dtype == np.float32 and len(got) == new_rate
    inner = slice(100, -100)
    assert np.abs(got[inner] - tone(1, new_rate)[inner]).max() < 2e-3


def test_resampling_removes_what_the_new_rate_cannot_hold():
    high = np.sin(2 * np.pi * 11_000 * np.arange(48_000) / 48_000).astype(np.float32)
    assert np.abs(resample(high, 48_000, 16_000)[100:-100]).max() < 1e-2
