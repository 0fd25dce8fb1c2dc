"""Special tokens inside a text stay as they are, and the text around them is normalised."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from light_tts.models.checkpoint.inputs import COSYVOICE3_INPUTS
from light_tts.models.frontend.spellers import wetext_spellers
from light_tts.models.frontend.text import LONGEST_SENTENCE, MAX_LENGTH, TextNormalizer, split_sentences
from light_tts.models.frontend.text_stream import TextStream
from light_tts.models.frontend.tokenizer import TextTokenizer

CHECKPOINT = Path("test/golden/cosyvoice3/checkpoint")
NORMALIZED = {
    "[HH][AH0][L][OW1] world in 2024": "[HH][AH0][L][OW1] world in twenty twenty four",
    "I have 3 [breath] cats, <strong>5 dogs</strong> and 2[laughter].": (
        "I have three [breath] cats, <strong>five dogs</strong> and two[laughter]."
    ),
    "  [breath]  Well,  [sigh] \n 5 km[cough]!  ": "[breath] Well, [sigh] five kilometers[cough]!",
    "[B][AY1] 5 [1] [x ] <b>": "[B][AY1] five [one] [x ] <b>",
    "高管[j][ǐ]予好评，2024年3月。": "高管[j][ǐ]予好评，二零二四年三月。",
    "我有3个[laughter]苹果 [breath] 和 5 [s][uì] 狗": "我有三个[laughter]苹果[breath]和五[s][uì]狗",
    "I say [L][AH1][V] you，你好 3[breath]": "I say [L][AH1][V] you，你好三[breath]",
}
BEGINNINGS = ["Dr. <strong>Smith [quick_", "[HH][AH0", "3 [", "好<", "[breath"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(CHECKPOINT, COSYVOICE3_INPUTS.special_tokens)


@pytest.fixture(scope="module")
def normalizer() -> TextNormalizer:
    return TextNormalizer(len, kept=COSYVOICE3_INPUTS.kept_tokens)


@pytest.mark.parametrize(("text", "normalized"), NORMALIZED.items())
def test_only_the_text_around_tokens_changes(normalizer, text, normalized):
    assert normalizer.normalize(text) == normalized


def test_without_a_speller_digits_in_tokens_are_not_named():
    plain = TextNormalizer(len, spellers={}, kept=COSYVOICE3_INPUTS.kept_tokens)
    assert plain.normalize("[HH][AH0][L][OW1] 2 worlds") == "[HH][AH0][L][OW1] two worlds"


@pytest.mark.parametrize("text", [*NORMALIZED, *BEGINNINGS])
def test_streamed_text_has_the_ids_of_the_whole_one(normalizer, tokenizer, text):
    language = "zh" if any("\u4e00" <= character <= "\u9fff" for character in text) else "en"
    whole = tokenizer.encode("".join(split_sentences(normalizer.normalize(text), language)))
    draw = random.Random(0)
    for cut_chance in (0.0, 0.2, 0.5, 1.0):
        stream, ids, piece = TextStream(normalizer, tokenizer), [], ""
        for character in text:
            piece += character
            if draw.random() < cut_chance:
                ids += stream.append(piece)
                piece = ""
        assert ids + stream.append(piece) + stream.finish() == whole


def test_a_token_does_not_hold_the_words_behind_it_back(normalizer, tokenizer):
    stream = TextStream(normalizer, tokenizer)
    given = [stream.append(piece) for piece in ("I have 3 [br", "eath] ", "cats ", "and ")]
    assert given[0] == tokenizer.encode("I have")
    assert tokenizer.encode("[breath]")[0] in given[1]
    assert given[2] and given[3]


@pytest.mark.parametrize("syllable", ["[HH][AH0]", "[j][ǐ]"])
def test_a_long_sentence_is_not_cut_inside_a_token(normalizer, tokenizer, syllable):
    text = ("好" if "ǐ" in syllable else "") + syllable * LONGEST_SENTENCE
    pieces = normalizer.split(text)
    assert len(pieces) > 1 and "".join(pieces).strip("。.") == text
    counts = [len(tokenizer.encode(piece)) for piece in pieces]
    assert all(piece.count("[") == piece.count("]") for piece in pieces)
    assert max(counts) <= MAX_LENGTH + LONGEST_SENTENCE


def test_plain_text_around_tokens_needs_no_speller():
    spelled = []

    def spell(text: str) -> str:
        spelled.append(text)
        return text

    normalizer = TextNormalizer(len, {"en": spell}, kept=COSYVOICE3_INPUTS.kept_tokens)
    text = "<strong>all</strong> is well [breath] now."
    assert normalizer.at_once(text) and normalizer.normalize(text) == text and not spelled
    assert not normalizer.at_once("[breath] it is 5 [breath] now")


def test_private_characters_do_not_become_tokens(normalizer, tokenizer):
    private = "".join(map(chr, range(0x10F000, 0x10F040)))
    assert normalizer.normalize(f"a {private}b") == "a b"
    stream = TextStream(normalizer, tokenizer)
    assert stream.append(f"a {private}b") + stream.finish() == tokenizer.encode("a b.")


def test_other_families_hand_all_text_to_the_speller():
    spell = wetext_spellers()["en"]
    assert TextNormalizer(len).normalize("[breath] 3") == spell("[breath] 3")
