"""Audio processing before the response, without a server."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from support.sound_files import decode

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.sound import FORMATS, SoundOut, SoundWishes, content_type
from light_tts.server.httpserver.sound.out import to_int16

RATE = 24_000


def tone(seconds: float, amplitude: float = 0.5) -> np.ndarray:
    """440 Hz, int16"""
    wave_form = np.sin(2 * np.pi * 440 * np.arange(int(RATE * seconds)) / RATE)
    return (amplitude * 32767 * wave_form).astype(np.int16)


def made(samples: np.ndarray, piece: int = 5000, **wishes) -> bytes:
    sound = SoundOut(SoundWishes(**wishes), RATE)
    pieces = [sound.push(samples[i : i + piece].tobytes()) for i in range(0, len(samples), piece)]
    return b"".join(pieces) + sound.finish()


def pcm(samples: np.ndarray, **wishes) -> np.ndarray:
    return np.frombuffer(made(samples, format="pcm", **wishes), "<i2")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "pcm"])
def test_a_format_decodes_to_its_last_sample(format, whole):
    samples, rate = decode(made(tone(1.3), format=format, whole=whole))
    assert 1.29 <= len(samples) / rate <= 1.38  # some formats end with a whole frame
    end = samples[int(1.2 * rate) : int(1.28 * rate)]
    assert 0.4 < np.abs(end).max() < 0.6


@pytest.mark.parametrize("format", FORMATS)
def test_audio_leaves_while_it_is_made(format):
    sound = SoundOut(SoundWishes(format), RATE)
    assert len(sound.push(tone(1.0).tobytes())) > 1000
    assert content_type(format).startswith("audio/")


@pytest.mark.parametrize("format", FORMATS)
def test_no_audio_at_all_is_no_error(format):
    made(np.zeros(0, np.int16), format=format)


def test_a_whole_wav_says_its_length():
    with wave.open(io.BytesIO(made(tone(0.5), format="wav", whole=True))) as file:
        assert file.getnframes() == RATE // 2


def test_both_ends_are_faded_and_the_middle_is_left_alone():
    flat = np.full(RATE, 20_000, np.int16)
    faded = pcm(flat)
    assert len(faded) == len(flat)
    assert abs(int(faded[0])) < 200 and abs(int(faded[-1])) < 200
    assert (np.diff(faded[:120].astype(int)) > 0).all() and (np.diff(faded[-120:].astype(int)) < 0).all()
    assert (faded[120:-120] == flat[120:-120]).all()


def test_sound_shorter_than_the_fades():
    assert len(pcm(tone(0.003))) == 72


@pytest.mark.parametrize("wishes", [{}, {"sample_rate": 16000}, {"max_pause": 0.1}, {"speed": 1.5}])
def test_how_audio_was_cut_changes_nothing(wishes):
    samples = np.concatenate((tone(0.4), np.zeros(RATE // 2, np.int16), tone(0.4)))
    assert np.array_equal(pcm(samples, piece=777, **wishes), pcm(samples, piece=30_000, **wishes))


def test_full_scale_is_clipped_and_never_wraps():
    loud = np.where(np.arange(RATE) // 30 % 2, 32767, -32768).astype(np.int16)  # overshoots when resampled
    out = pcm(loud, sample_rate=44100)
    assert out.max() == 32767 and out.min() == -32768
    back = pcm(loud)
    assert np.array_equal(back[200:-200], loud[200:-200])
    assert to_int16(np.array([1.5, -1.5], np.float32)).tolist() == [32767, -32768]


def test_long_pauses_are_shortened():
    pause = np.zeros(RATE, np.int16)
    samples = np.concatenate((pause, tone(0.5), pause, tone(0.5), pause[: RATE // 10]))
    assert len(pcm(samples, max_pause=0.2)) == pytest.approx(RATE * (0.2 + 0.5 + 0.2 + 0.5 + 0.1), rel=0.01)
    assert len(pcm(samples)) == len(samples)


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.8, 1.5, 4.0])
def test_speed_changes_the_length_and_not_the_pitch(speed):
    out = pcm(tone(2.0), speed=speed).astype(float)
    assert len(out) / RATE == pytest.approx(2.0 / speed, rel=0.03, abs=0.06)
    spectrum = np.abs(np.fft.rfft(out))
    assert np.argmax(spectrum) * RATE / len(out) == pytest.approx(440, abs=6)


def test_a_rate_that_a_format_has_not():
    with pytest.raises(RequestError, match="not possible with opus") as refused:
        SoundOut(SoundWishes("opus", sample_rate=44100), RATE)
    assert refused.value.field == "sample_rate"
