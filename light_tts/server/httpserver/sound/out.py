"""SoundOut: converts the stages' PCM to the bytes of a response."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.sound import encoders
from light_tts.server.httpserver.sound.shape import Fade, PauseLimit, Resampler, SoundStep, Tempo


@dataclass(frozen=True)
class SoundWishes:
    """The audio format a client requests. `sample_rate` None: the checkpoint's; `max_pause`: longer pauses
    are cut to this many seconds; `whole`: complete and with its length instead of streamed; `bit_rate`: bits
    per second, None: the format's default."""

    format: str
    sample_rate: int | None = None
    speed: float = 1.0
    max_pause: float | None = None
    whole: bool = False
    bit_rate: int | None = None


class SoundOut:
    """Converts the audio of one response, with a fade at both ends. Blocking: use it in a thread."""

    def __init__(self, wishes: SoundWishes, source_rate: int) -> None:
        """`source_rate`: sample rate of the stages' PCM. Raises RequestError (400) if the format does not
        support the request."""
        rate = wishes.sample_rate or source_rate
        possible = encoders.rates_of(wishes.format)
        if rate not in possible:
            raise RequestError(
                400,
                f"sample_rate {rate} is not possible with {wishes.format}; possible are "
                f"{', '.join(map(str, possible))}",
                field="sample_rate",
            )
        self.sample_rate = rate
        self.format = wishes.format
        self.content_type = encoders.content_type(wishes.format)
        self._steps: list[SoundStep] = []
        if wishes.max_pause is not None:
            self._steps.append(PauseLimit(source_rate, wishes.max_pause))
        if wishes.speed != 1.0:
            self._steps.append(Tempo(source_rate, wishes.speed))
        if rate != source_rate:
            self._steps.append(Resampler(source_rate, rate))
        self._steps.append(Fade(rate))
        self.whole = wishes.whole
        self.speed = wishes.speed
        self._encoder = encoders.encoder(wishes.format, rate, wishes.whole, wishes.bit_rate)

    def push(self, pcm: bytes) -> bytes:
        """Add PCM of the stages (16 bits); return the bytes that can be sent now."""
        samples = np.frombuffer(pcm, "<i2").astype(np.float32) / 32768
        for step in self._steps:
            samples = step.push(samples)
        return self._encoder.push(to_int16(samples))

    def finish(self) -> bytes:
        samples = np.zeros(0, np.float32)
        for step in self._steps:
            samples = np.concatenate((step.push(samples), step.finish()))
        return self._encoder.push(to_int16(samples)) + self._encoder.finish()


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Convert (n,) float32 to int16 with clipping."""
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
