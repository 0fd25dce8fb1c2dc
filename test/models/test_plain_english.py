"""Text that wetext does not change, checked against wetext itself."""

import random

import pytest

from light_tts.models.frontend.plain_english import PlainEnglish
from light_tts.models.frontend.spellers import wetext_spellers

# Patterns that grammars of numbers, dates, times, units, titles and addresses have rules for.
TEMPTING = """
may march june monday sunday january am pm to of and in the a an one two three ten first second five km kg
lb oz ft st rd dr mr mrs ms jr sr vs etc i ii iv vi x xx chapter henry part page line number no half quarter
past minus plus times point percent dollar euro pound cent degrees celsius hour o'clock year bc ad th nd www
com dot at slash hundred thousand million oh zero minute inch feet mile square cubic avenue street north
it's don't we'll dogs twenty-one co-op x-ray e-mail new york united states per
"""


@pytest.fixture(scope="module")
def spell():
    return wetext_spellers()["en"]


def test_plain_text_is_what_wetext_gives_back(spell):
    is_plain = PlainEnglish(spell)
    draw = random.Random(0)
    tempting = TEMPTING.split()
    words = [*tempting, *map(str.capitalize, tempting), "I", "London", "King", "Prof", "Inc", "Gen"]
    plain = 0
    for _ in range(600):
        marks = draw.choices(["", ",", ".", "!", "?", ";", ":"], [20, 1, 1, 1, 1, 1, 1], k=12)
        text = " ".join(draw.choice(words) + mark for mark in marks)
        if is_plain(text):
            plain += 1
            assert spell(text) == text
    assert plain > 100


def test_ordinary_sentences_are_plain(spell):
    is_plain = PlainEnglish(spell)
    for text in (
        "The day was long and bright, so we bought water for you.",
        "It's late; I don't think she'll come, said Tom.",
        "A well-known co-op opens: every day!",
    ):
        assert is_plain(text)
        assert spell(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "It is 5 km.",
        "per kg",
        "a cup per ms",
        "Dr. Smith came.",
        "World War I ended.",
        "two  blanks",
        "$5",
        "a \u2014 b",
        "caf\u00e9",
        "",
        "U.S.",
    ],
)
def test_all_else_is_left_to_wetext(spell, text):
    assert not PlainEnglish(spell)(text)


def test_a_word_with_a_capital_is_spelled_once():
    spelled = []

    def spell(text):
        spelled.append(text)
        return text.replace("Dr.", "doctor")

    is_plain = PlainEnglish(spell)
    assert [is_plain("The cat and The dog.") for _ in range(3)] == [True] * 3
    assert not is_plain("The cat of Dr. dog.")
    assert not is_plain("The cat of Dr. dog.")
    assert sorted(spelled) == ["Dr.", "The"]
