"""Splits a text, which may be a whole book, into chapters and parts that are spoken one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

PART = 400  # maximum characters per part
SUBTITLE = 90  # maximum characters per part if it is shown as a subtitle
AFTER_SENTENCE, AFTER_PARAGRAPH, AFTER_HEADING = 0.2, 0.5, 1.0  # seconds of silence

_NUMBER = r"(?:\d+|[ivxlc]+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
_HEADING = re.compile(
    rf"#{{1,3}}\s+\S.*|(?:chapter|book|part)\s+{_NUMBER}\b.{{0,60}}|(?:prologue|epilogue|preface)[.:]?"
    r"|第[0-9零〇一二两三四五六七八九十百千]+[章回节卷部].{0,40}",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r".+?(?:[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|$)\s*", re.DOTALL)
_CLAUSE = re.compile(r".+?(?:[,;:](?=\s)|[，；：、]|$)\s*", re.DOTALL)
_CJK = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")
_SPOKEN = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class BookPart:
    """A part of a chapter. `pause`: seconds of silence after it."""

    text: str
    pause: float


@dataclass
class Chapter:
    """A chapter. `title`: empty before the first heading."""

    title: str
    parts: list[BookPart] = field(default_factory=list)

    @property
    def characters(self) -> int:
        return sum(len(part.text) for part in self.parts)


def chapters(text: str, longest: int = PART) -> list[Chapter]:
    """Return the chapters that have something to say, in parts of at most `longest` characters. A heading is
    a line of its own: `# Title`, `Chapter 3`, `第三章`."""
    found = [Chapter("")]
    for paragraph in _paragraphs(text):
        if _is_heading(paragraph):
            title = paragraph.lstrip("# ").strip()
            found.append(Chapter(title, [BookPart(title, AFTER_HEADING)]))
        else:
            found[-1].parts += _parts(paragraph, longest)
    return [chapter for chapter in found if chapter.parts]


def _is_heading(paragraph: str) -> bool:
    return _HEADING.fullmatch(paragraph) is not None


def _paragraphs(text: str) -> Iterator[str]:
    """Yield paragraphs: consecutive lines form one paragraph, as in plain-text books, except for headings."""
    lines: list[str] = []
    for line in [*text.replace("\r\n", "\n").split("\n"), ""]:
        line = line.strip()
        if line and not _is_heading(line):
            lines.append(line)
            continue
        if lines:
            yield _join(lines)
            lines = []
        if line:
            yield line


def _join(lines: list[str]) -> str:
    """Join lines, without a space between two lines of Chinese."""
    joined = lines[0]
    for line in lines[1:]:
        joined += line if _CJK.fullmatch(joined[-1]) and _CJK.fullmatch(line[0]) else f" {line}"
    return joined


def _parts(paragraph: str, longest: int) -> list[BookPart]:
    texts = [text for text in _gather(_pieces(paragraph, longest), longest) if _SPOKEN.search(text)]
    pauses = [AFTER_SENTENCE] * (len(texts) - 1) + [AFTER_PARAGRAPH]
    return [BookPart(text, pause) for text, pause in zip(texts, pauses, strict=True)] if texts else []


def _gather(pieces: Iterator[str], longest: int) -> Iterator[str]:
    """Combine pieces up to the length of a part."""
    held = ""
    for piece in pieces:
        if held and len(held) + len(piece) > longest:
            yield held.strip()
            held = ""
        held += piece
    if held.strip():
        yield held.strip()


def _pieces(paragraph: str, longest: int) -> Iterator[str]:
    """Yield sentences, the clauses of a sentence that is too long, or the words of such a clause."""
    for sentence in _SENTENCE.findall(paragraph):
        if len(sentence) <= longest:
            yield sentence
            continue
        for clause in _CLAUSE.findall(sentence):
            while len(clause) > longest:
                cut = clause.rfind(" ", 0, longest) + 1 or longest
                yield clause[:cut]
                clause = clause[cut:]
            yield clause
