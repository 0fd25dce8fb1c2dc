"""How `light-tts speak` cuts a book."""

import pytest

from light_tts.cli.book import PART, chapters

BOOK = """The Book of Boats
by Nobody

CHAPTER I. The Sea

The boat was on its way
to the sea. "Look!" said Anna.

* * *

# Second part

它是船。
它在海上。
"""


def texts(text: str) -> list[str]:
    return [part.text for chapter in chapters(text) for part in chapter.parts]


def test_headings_begin_chapters_and_lines_join():
    found = chapters(BOOK)
    assert [chapter.title for chapter in found] == ["", "CHAPTER I. The Sea", "Second part"]
    assert [part.text for part in found[1].parts] == [
        "CHAPTER I. The Sea",
        'The boat was on its way to the sea. "Look!" said Anna.',
    ]
    assert found[2].parts[-1].text == "它是船。它在海上。"


@pytest.mark.parametrize("line", ["第三章 大海", "Chapter 12", "chapter two: Home", "## Notes", "Epilogue"])
def test_a_line_is_a_heading(line):
    assert [chapter.title for chapter in chapters(f"Before.\n{line}\nAfter.")] == ["", line.lstrip("# ")]


@pytest.mark.parametrize("line", ["Part of it was gone.", "Chapters are long.", "第一次见面。", "#hashtag"])
def test_a_line_is_none(line):
    assert len(chapters(f"Before.\n\n{line}\n\nAfter.")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "One sentence after the other. " * 60,
        "one clause after the other, " * 60,
        "words " * 300,
        "x" * 1500,
        "一句又一句。" * 200,
        "一个又一个，" * 200,
    ],
)
def test_parts_are_short_and_nothing_is_lost(text):
    parts = texts(text)
    assert max(map(len, parts)) <= PART
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_nothing_to_say_gives_nothing():
    assert chapters("* * *\n\n---\n") == []
