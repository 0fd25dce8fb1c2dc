"""Word timings of a speech, mapped to the text as the client wrote it, and subtitles made from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from light_tts.server.httpserver.request import SpeechRequest

TOKENS_PER_SECOND = 25
LONGEST_LINE = 42  # characters per subtitle
FRAME = 0.01  # seconds
QUIET = 0.01  # fraction of full scale: -40 dBFS
LONGEST_PAUSE = 0.8  # seconds between words within one subtitle
_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_WRITTEN = re.compile(rf"{_CJK.pattern}[^\w\s]*|(?:(?!{_CJK.pattern})\S)+")
_SENTENCE_END = (".", "!", "?", "。", "！", "？", "…")


@dataclass(frozen=True)
class Word:
    """A word and its time. `start`, `end`: seconds from the beginning of the audio."""

    text: str
    start: float
    end: float


def word_times(
    request: SpeechRequest,
    pcm: Sequence[bytes],
    sample_rate: int,
    speed: float = 1.0,
    complete: bool = True,
) -> list[Word]:
    """Return the words of the request's text, or an empty list if word times were not requested or are
    unknown. `pcm`: the audio so far, used to trim silence from both ends of each word; `speed`: speed of
    the outgoing audio; `complete`: `pcm` is all the audio; if not, only words that end within it are
    returned."""
    loud = _loud(pcm, sample_rate)
    heard = math.inf if complete else sum(map(len, pcm)) / 2 / sample_rate
    spoken: list[Word] = []
    begin = 0.0
    for part, words in zip(request.parts, request.words, strict=False):
        length = part.samples / sample_rate
        for word, first, last in zip(words, part.times[::2], part.times[1::2], strict=False):
            if begin + last / TOKENS_PER_SECOND > heard:
                break
            start, end = (min(length, token / TOKENS_PER_SECOND) for token in (first, last))
            start, end = _without_silence(begin + start, begin + end, loud)
            spoken.append(Word(word, start / speed, end / speed))
        begin += length
    return as_written(request.text, spoken, complete)


def _loud(pcm: Sequence[bytes], sample_rate: int) -> np.ndarray:
    """Return (frames,) bool: which FRAMEs of the audio are above the silence threshold."""
    samples = np.frombuffer(b"".join(pcm), "<i2").astype(np.int32)
    size = round(sample_rate * FRAME)
    frames = np.abs(samples[: len(samples) // size * size]).reshape(-1, size)
    return frames.max(axis=1, initial=0) > QUIET * 32768


def _without_silence(start: float, end: float, loud: np.ndarray) -> tuple[float, float]:
    """Return the interval without the silence at its ends, or unchanged if all of it is silent."""
    first = round(start / FRAME)
    heard = np.flatnonzero(loud[first : round(end / FRAME)])
    if not len(heard):
        return start, end
    return max(start, (first + heard[0]) * FRAME), min(end, (first + heard[-1] + 1) * FRAME)


def as_written(text: str, spoken: Sequence[Word], complete: bool = True) -> list[Word]:
    """Return the words of `text` with the times of the words spoken for them, for example "12" for "twelve".
    Words of the text that were spoken as others together become one entry. If not `complete`, more words
    will be spoken, and only those up to the last one spoken as written are returned."""
    written = _WRITTEN.findall(text)
    match = SequenceMatcher(None, [_bare(word) for word in written], [_bare(word.text) for word in spoken])
    words: list[Word] = []
    steps = match.get_opcodes()
    while steps and not complete and steps[-1][0] != "equal":
        steps.pop()
    for kind, i1, i2, j1, j2 in steps:
        if kind == "equal":
            pairs = zip(written[i1:i2], spoken[j1:j2], strict=True)
            words += [Word(word, heard.start, heard.end) for word, heard in pairs]
        elif j2 > j1 and i2 > i1:
            words.append(Word(" ".join(written[i1:i2]), spoken[j1].start, spoken[j2 - 1].end))
        elif i2 > i1 and words:  # not spoken on its own, such as a dash or bracket
            joined = " ".join((words[-1].text, *written[i1:i2]))
            words[-1] = Word(joined, words[-1].start, words[-1].end)
    return words


def as_dicts(words: Iterable[Word]) -> list[dict[str, str | int]]:
    """Return JSON objects with times in milliseconds."""
    return [{"word": w.text, "start_ms": _ms(w.start), "end_ms": _ms(w.end)} for w in words]


def srt(words: Sequence[Word]) -> str:
    blocks = [
        f"{number}\n{_clock(line[0].start, ',')} --> {_clock(line[-1].end, ',')}\n{_joined(line)}\n"
        for number, line in enumerate(_lines(words), 1)
    ]
    return "\n".join(blocks)


def vtt(words: Sequence[Word]) -> str:
    blocks = [
        f"{_clock(line[0].start, '.')} --> {_clock(line[-1].end, '.')}\n{_joined(line)}\n"
        for line in _lines(words)
    ]
    return "\n".join(("WEBVTT\n", *blocks))


def _lines(words: Sequence[Word]) -> list[list[Word]]:
    lines: list[list[Word]] = []
    for word in words:
        line = lines[-1] if lines else []
        if (
            not line
            or line[-1].text.endswith(_SENTENCE_END)
            or word.start - line[-1].end > LONGEST_PAUSE
            or len(_joined([*line, word])) > LONGEST_LINE
        ):
            line = []
            lines.append(line)
        line.append(word)
    return lines


def _joined(words: Sequence[Word]) -> str:
    text = ""
    for word in words:
        close = not text or (_CJK.match(word.text) and _CJK.search(text[-2:]))
        text += word.text if close else f" {word.text}"
    return text


def _bare(word: str) -> str:
    return re.sub(r"\W", "", word).casefold()


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _clock(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(_ms(seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
