"""One spoken line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from light_tts.tools.evaluation.lines import Line
from light_tts.tools.evaluation.sound import Sound, read_sound


@dataclass(frozen=True)
class Take:
    """The result of one line. `sound`: None if there is an `error`. `wall`, `first_audio`: seconds from the
    request to the last and to the first byte of audio; `limit`: maximum length of speech that the server was
    allowed. These three are None for existing audio."""

    line: Line
    sound: Sound | None
    error: str = ""
    wall: float | None = None
    first_audio: float | None = None
    limit: float | None = None


def read_takes(lines: Sequence[Line]) -> Iterator[Take]:
    """Yield takes of lines that have a `wav`."""
    for line in lines:
        try:
            yield Take(line, read_sound(line.wav))
        except (OSError, ValueError) as error:
            yield Take(line, None, str(error))
