"""Expensive texts, normalised in segments that take turns: the result is the same, and nobody waits long."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from light_tts.common.speakable import can_become_speakable, is_speakable
from light_tts.models.frontend.segments import MAX_COST, ODD_COST, segments
from light_tts.models.frontend.spellers import wetext_spellers
from light_tts.models.frontend.text import Abandoned, TextNormalizer
from light_tts.models.frontend.turns import Turns

COSTLY = ["." * 5000, "1," * 2500, "。" * 5000, "(" * 5000, "-" * 5000, '"' * 5000, "好1" * 2500, "x" * 5000]
ENGLISH = """On 5 March 2024, Dr. Smith paid $12.50 for 3 apples at 10:30 a.m.; it was 25 km to No. 7 King St.
and back. He had 1,234 reasons to go, and 1/2 of them were good: the weather (22 degrees), the price, and the
fact that "nobody else" would be there before 11 o'clock. We met at 9, at the corner of 5th Avenue, and walked
for 3.5 miles. Nobody spoke. Was it 1999 or 2001 when the bridge was closed? Mrs. Jones, who lives at 7 Baker
Street, says that 40% of the people left within 2 years, and that the rest stayed because of the river, the
hills and the quiet evenings that only a town as small as this one can have in the middle of a long summer."""
CHINESE = (
    "2024年3月5日，他花了12.5元买了3个苹果。今天气温25.5度，房价5000元/m²，电话是13800138000！"
    "我们上午9:30出发，走了3.5公里；路上没有人说话。第2天下了1/2天的雨，大约40%的人都没有来？"
) * 4


def cost(text: str) -> int:
    return sum(1 if c.isalpha() or c.isspace() else ODD_COST for c in text)


@pytest.mark.parametrize("text", [*COSTLY, ENGLISH, CHINESE, "", " ", "a", " \n" * 500])
def test_segments_are_the_text_and_none_costs_much(text):
    parts = segments(text)
    assert "".join(parts) == text
    assert max(map(cost, parts)) <= MAX_COST
    assert len(parts) <= 1 + 2 * cost(text) // MAX_COST


@pytest.mark.parametrize(
    "text", [ENGLISH, ENGLISH.replace("\n", " "), CHINESE], ids=["lines", "line", "Chinese"]
)
def test_ordinary_text_has_the_same_words_in_segments_as_in_one(text):
    language = "zh" if text is CHINESE else "en"
    spell = wetext_spellers()[language]
    assert len(segments(text)) > 3
    in_segments = TextNormalizer(len, {language: spell}).normalize(text)
    whole = spell(text)
    if language == "zh":
        whole = TextNormalizer(len, {}).normalize(whole)
    assert in_segments == whole


def test_a_short_text_passes_a_long_one():
    order: list[str] = []
    begun = threading.Event()

    def spell(text: str) -> str:
        begun.set()
        time.sleep(0.002)
        return text

    normalizer = TextNormalizer(len, {"en": spell})

    def normalize(text: str, name: str) -> None:
        normalizer.normalize(text)
        order.append(name)

    with ThreadPoolExecutor(12) as threads:
        for number in range(10):
            threads.submit(normalize, "1," * 2500, f"long {number}")
        begun.wait(10)
        threads.submit(normalize, "4 cats", "short")
    assert order[0] == "short" and len(order) == 11


def test_turns_go_to_those_who_had_fewest_and_came_first():
    turns, order = Turns(1), []

    def take(had: int, name: str) -> None:
        with turns.turn(had):
            order.append(name)

    threads = []
    with turns.turn(0):
        for had, name in ((2, "c"), (0, "a"), (1, "b"), (2, "d")):
            threads.append(threading.Thread(target=take, args=(had, name)))
            threads[-1].start()
            while len(turns._waiting) < len(threads):
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == ["a", "b", "c", "d"]


def test_a_text_that_nobody_wants_any_more_is_left():
    spelled: list[str] = []

    def spell(text: str) -> str:
        spelled.append(text)
        return text

    with pytest.raises(Abandoned):
        TextNormalizer(len, {"en": spell}).split("1," * 2500, lambda: len(spelled) < 3)
    assert len(spelled) == 3


def test_text_after_a_failure_is_left_as_it_is():
    def spell(text: str) -> str:
        if "x" in text:
            raise ValueError(text)
        return text.replace("1", "one")

    text = "1 cat. " * 50 + "x " + "1 cat. " * 50
    got = TextNormalizer(len, {"en": spell}).normalize(text)
    assert got.startswith("one cat. one cat. ") and got.endswith(
        "one cat. one cat."
    )  # digits are always expanded
    assert "x" in got


@pytest.mark.parametrize("text", ["...", "。。。", "(((", "---", '"""', "", " \n", "\u200b", "…—«»"])
def test_punctuation_has_nothing_to_speak(text):
    assert not can_become_speakable(text)


@pytest.mark.parametrize("text", ["a", "1", "好", "é", "$", "%", "&", "- 5 -"])
def test_letters_digits_and_symbols_that_have_a_name_can_be_spoken(text):
    assert can_become_speakable(text)


def test_no_symbol_that_has_a_name_is_missing():
    spell = wetext_spellers()["en"]
    for code in range(0x21, 0x100):
        text = chr(code)
        if not can_become_speakable(text):
            assert not is_speakable(spell(text)), text
