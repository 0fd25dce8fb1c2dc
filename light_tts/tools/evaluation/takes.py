"""One line spoken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from light_tts.tools.evaluation.lines import Line
from light_tts.tools.evaluation.sound import Sound, read_sound


@dataclass(frozen=True)
class Take:
    """`sound`: None where there is an `error`. `wall`, `first_audio`: seconds from the request to the last
    and to the first byte of sound; `limit`: seconds that the server was allowed to speak. The three are None
    for sound that was there already."""

    line: Line
    sound: Sound | None
    error: str = ""
    wall: float | None = None
    first_audio: float | None = None
    limit: float | None = None


def read_takes(lines: Sequence[Line]) -> Iterator[Take]:
    """Takes of lines that have a `wav`."""
    for line in lines:
        try:
            yield Take(line, read_sound(line.wav))
        except (OSError, ValueError) as error:
            yield Take(line, None, str(error))
