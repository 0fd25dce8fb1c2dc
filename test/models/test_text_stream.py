"""Incremental text yields the ids of the whole text early, however it is split."""

from __future__ import annotations

import random
import time
from itertools import chain, pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from light_tts.models.frontend.text import TextNormalizer, split_sentences
from light_tts.models.frontend.text_groups import MAX_GROUP
from light_tts.models.frontend.text_stream import TextStream
from light_tts.models.frontend.token_stream import TokenStream
from light_tts.models.frontend.tokenizer import TextTokenizer

CHECKPOINT = Path("test/golden/cosyvoice2/checkpoint")
ENGLISH = [
    "The weather has been lovely this week, hasn't it?",
    "It costs $3.50, and 1,234 people saw Dr. Smith at 10:30 on May 5, 2020.",
    "Call 555-1234 or see www.example.com; No. 5 is 12 Main Street, Jackson, MS.",
    'He said "never mind" (twice), and left at 5 p.m. EST on Jan. 3rd.',
    "World War II ended in 1945. World War I did in 1918.",
    "It's 20°C, 5 sq ft, 3 1/2 cups, 60 km per hour, 50% & more!",
    "Wait... what?! “Really?” she asked; 'yes' -- J. R. R. Tolkien wrote it",
    "  Two  blanks,\nnew lines\tand tabs  ",
    "Emoji 😀 👩‍👩‍👧 in text, cafe\u0301 and cafés, naïve x\u0301\u0323y Ångström ﬁn",
    "[breath] I'm <strong>sure</strong> that [laughter] we'll go [quick_",
    "SHOUTING IS NOT AN ABBREVIATION BUT USA AND NASA ARE",
    "Привет, мир! Ελληνικά 한국어 \u1112\u1161\u11ab ไทยภาษา العربية 3 ٣ १",
    "#1 is a+b=c, e=mc^2, C++ and a_b [x] {y} <z> ~5",
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "hasn'thas 'round '' 'S'LL",
    "no end",
    "a\x00b\x07c \u200b d",
]
CHINESE = [
    "今天天气很好，我们去公园散步吧。",
    "现在是2024年5月3日下午3点30分，气温25.5℃，湿度60%。",
    "他买了3个苹果和5公斤大米,共花了￥128.5元!",
    "我用 Python 3 写了一个 hello world 程序 - 很简单——真的，，",
    "中国3:2日本，比分是 3:2。电话：13800138000",
    "（一）第1名【重要】：x²+y³ 和 5×3=15、、",
    "你好\n世界 。 。！？“好”‘吗’……",
    "我们在 the old house near the river 住了 10 years , 很开心 😀😀",
    "か\u3099くせい と がくせい は 学生 です。",
    "龘龖厵𠀀𠮷野家〇",
]
MIXED = [
    "Hello, 你好 world, 3 people 来了。",
    "I paid 3.50 for the book. 然后我走了 5 公里。",
    "<|en|>Text 3 as it is  <strong>\n here",
    "我说<|laughter|> 3 个",
    "<|a|>  3 b  \n \n  c!\n\n 5  x",
    "好，，<|b|>，3",
    "5 " * 120 + "，，，" * 90 + "x",
    "$5 " * 90 + "公里 3",
    "a <| b 你",
]
SILENT = ["", " ", "...", " \n ", "。。！", "😀", "“”"]
TEXTS = ENGLISH + CHINESE + MIXED + SILENT


class Learned(TextTokenizer):
    """The checkpoint's tokenizer with merges learned from the texts here, Chinese words among them."""

    def __init__(self) -> None:
        super().__init__(CHECKPOINT)
        plain = Tokenizer(models.BPE())
        plain.normalizer, plain.pre_tokenizer = self._encoding.normalizer, self._encoding.pre_tokenizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=1500, initial_alphabet=alphabet, min_frequency=1, show_progress=False
        )
        plain.train_from_iterator([text for text in TEXTS for _ in range(3)] + CHINESE, trainer)
        plain.add_special_tokens(self.special_tokens)
        self._encoding = plain


@pytest.fixture(scope="module", params=[lambda: TextTokenizer(CHECKPOINT), Learned], ids=["tiny", "learned"])
def tokenizer(request) -> TextTokenizer:
    return request.param()


@pytest.fixture(scope="module")
def normalizer() -> TextNormalizer:
    return TextNormalizer(len)


def cuts(text: str, draw: random.Random) -> list[str]:
    """Return the text in pieces: characters, words, or random lengths including empty ones."""
    way = draw.randrange(3)
    if way == 0:
        return list(text)
    if way == 1:
        blanks = [i + draw.randrange(2) for i, character in enumerate(text) if character == " "]
        ends = [0, *blanks, len(text)]
    else:
        ends = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(1, 12)))
        ends = [0, *ends, len(text)]
    return [text[begin:end] for begin, end in pairwise(ends)]


def ids_of(stream: TextStream | TokenStream, pieces: list[str]) -> list[int]:
    ids = []
    for piece in pieces:
        ids += stream.append(piece)
    return ids + stream.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_whole_text(tokenizer, text):
    draw = random.Random(1)
    whole = tokenizer.encode(text.rstrip())
    for _ in range(8):
        pieces = cuts(text, draw)
        assert ids_of(TokenStream(tokenizer), pieces) == whole, pieces


@pytest.mark.parametrize("text", TEXTS)
def test_ids_do_not_depend_on_the_cuts(normalizer, tokenizer, text):
    draw = random.Random(2)
    whole = ids_of(TextStream(normalizer, tokenizer), [text])
    for _ in range(8):
        pieces = cuts(text, draw)
        assert ids_of(TextStream(normalizer, tokenizer), pieces) == whole, pieces


@pytest.mark.parametrize("text", [*ENGLISH, *CHINESE])
def test_ids_are_those_of_a_whole_answer(normalizer, tokenizer, text):
    language = "zh" if text in CHINESE else "en"
    spoken = "".join(split_sentences(normalizer.normalize(text), language))
    assert ids_of(TextStream(normalizer, tokenizer), [text]) == tokenizer.encode(spoken)


@pytest.mark.parametrize("seed", range(8))
def test_mixtures_of_texts_do_not_depend_on_the_cuts(normalizer, tokenizer, seed):
    draw = random.Random(seed)
    words = " ".join(draw.sample(TEXTS, 5)).split(" ")
    text = "".join(word + draw.choice(["", " ", " ", " ", "\n"]) for word in draw.sample(words, len(words)))
    whole = ids_of(TextStream(normalizer, tokenizer), [text])
    assert all(ids_of(TextStream(normalizer, tokenizer), cuts(text, draw)) == whole for _ in range(5))


@pytest.mark.parametrize("text", SILENT)
def test_text_with_nothing_to_say_has_no_ids(normalizer, tokenizer, text):
    assert ids_of(TextStream(normalizer, tokenizer), list(text)) == []


def test_a_word_is_given_at_the_blank_behind_it(normalizer, tokenizer):
    stream = TextStream(normalizer, tokenizer)
    for word in ["The", " weather", " has", " been", " lovely", " today"]:
        assert stream.append(word + " ") == tokenizer.encode(word)
    assert stream.finish() == tokenizer.encode(".")


def test_what_a_number_may_be_part_of_is_held_back(normalizer, tokenizer):
    stream = TextStream(normalizer, tokenizer)
    given = [stream.append(piece) for piece in ["It is 1", ",23", "4 ", "sq ", "ft ", "in ", "all"]]
    assert [bool(ids) for ids in given] == [True, False, False, False, False, True, False]
    spoken = normalizer.normalize("It is 1,234 sq ft in all")
    assert [*chain(*given), *stream.finish()] == tokenizer.encode(spoken + ".")


def test_chinese_is_given_while_the_clause_goes_on(normalizer):
    stream = TextStream(normalizer, TextTokenizer(CHECKPOINT))
    given = [len(stream.append(character)) for character in "今天天气很好我们去公园散步吧"]
    assert sum(given) >= 5


@pytest.mark.parametrize("unit", ["a", "1", "。", "😀", "- ", " ", "1 ", "A ", "中1", "，", "!?", "\n"])
def test_text_without_a_place_to_cut_does_not_pile_up(normalizer, tokenizer, unit):
    text = unit * (2000 // len(unit))
    whole = ids_of(TextStream(normalizer, tokenizer), [text])
    stream, given = TextStream(normalizer, tokenizer), []
    most = 0
    start = time.process_time()
    for begin in range(0, len(text), 7):
        given += stream.append(text[begin : begin + 7])
        most = max(most, held(stream))
    assert given + stream.finish() == whole
    assert most <= 4 * MAX_GROUP
    print(f"{unit!r}: {time.process_time() - start:.2f} s, {most} characters held")


def held(stream: TextStream) -> int:
    """Return the number of characters held back in the stream."""
    text = stream._text
    return len(text._groups._waiting) + len(text._chinese._waiting) + len(stream._tokens._waiting)
