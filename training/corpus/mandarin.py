"""The Mandarin sentences for the teacher: a textbook list, pattern-based everyday talk, and generated
sentences with dictionary words, in written form and as the teacher's phonemes.

python -m training.corpus.mandarin [--work build/train_mini]

Writes mandarin.jsonl in the work folder, in the format of sentences.jsonl with an additional "words": the
spoken text with a space after each word, since Mandarin has none. Requires `packages.py --languages en zh`
and wetext.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.corpus.everyday import everyday
from training.corpus.mandarin_everyday import PATTERNS, WORDS
from training.corpus.packages import HSK, JIEBA, MANDARIN_PHONEMIZER, phoneme_ids, unpacked
from training.corpus.sentences import MOST_PHONEMES, Sentence, normalizer, split_of
from training.work import argument_parser, lines_to

FILE = "mandarin.jsonl"
EVERYDAY, DICTIONARY = 24_000, 30_000
LONGEST = 60  # characters
# Runs of characters, each followed by its end mark: what the phonemizer can split.
SPEAKABLE = re.compile(r"(?:[\u4e00-\u9fff]+[，。？！、；：])+")
RUN = re.compile(r"([\u4e00-\u9fff]+)([，。？！、；：])")
LEAST_FREQUENT = 20  # minimum frequency of a word in the dictionary
# Word classes in the dictionary, by their name in patterns.
KINDS = {"noun": ("n",), "verb": ("v",), "quality": ("a",), "town": ("ns",), "idiom": ("i", "l")}
# Words that the voice must not learn to say.
COARSE = re.compile(r"[肏屄屌娼妓婊嫖奸尻]|强暴|他妈|王八|混蛋|傻逼|贱人|鸡巴|操你|自杀|阴道|阴茎|乱伦")


@dataclass(frozen=True)
class MandarinSentence(Sentence):
    words: str


class MandarinFrontend:
    """Returns the teacher's Mandarin phonemes of a text, and the words they belong to."""

    def __init__(self, work: Path) -> None:
        for package in MANDARIN_PHONEMIZER:
            sys.path.insert(0, str(unpacked(package, work)))
        sys.path.insert(0, str(unpacked(JIEBA, work)))
        import jieba
        from misaki.zh import ZHG2P

        jieba.setLogLevel(logging.ERROR)
        self._divide: Callable[[str], list[str]] = jieba.lcut
        self._phonemize = ZHG2P()

    def __call__(self, text: str) -> tuple[str, str] | None:
        """text: matching SPEAKABLE -> (phonemes, words), both with spaces between words and with the same
        number of words; None if something in it has no phonemes."""
        words = []
        for characters, mark in RUN.findall(text):
            *before, last = self._divide(characters)
            words += [*before, last + mark]
        try:
            phonemes = self._phonemize(text)[0]
        except (KeyError, ValueError, AssertionError):
            return None
        return (phonemes, " ".join(words)) if len(phonemes.split(" ")) == len(words) else None


def dictionary_words(file: Path) -> dict[str, list[str]]:
    """Return words of two to four common characters, for each of KINDS."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    names = {tag: kind for kind, tags in KINDS.items() for tag in tags}
    for line in file.read_text("utf-8").splitlines():
        word, count, tag = line.split(" ")
        if (
            tag in names
            and int(count) >= LEAST_FREQUENT
            and 2 <= len(word) <= 4
            and all(map(is_common, word))
        ):
            found[names[tag]].append(word)
    return found


def is_common(character: str) -> bool:
    """Return whether it is one of the 3,755 simplified characters in the first level of GB 2312."""
    try:
        encoded = character.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return len(encoded) == 2 and 0xB0 <= encoded[0] <= 0xD7


def textbook(folder: Path) -> Iterator[str]:
    sentences = json.loads((folder / "hsk_sentences_audio" / "data" / "sentences.json").read_text("utf-8"))
    for sentence in sentences:
        yield sentence["chinese"]


def lists(words: dict[str, list[str]]) -> Iterator[str]:
    """Yield lists of four words that cover every word about once, because sentences lack the rare ones."""
    every = sorted({word for some in words.values() for word in some})
    step = -(-len(every) // 4)
    for number in range(step):
        yield "，".join(every[number::step]) + "。"


def tidy(text: str) -> str | None:
    """Return the text with an end mark, or None if it is not suitable."""
    text = text.strip()
    text = text if text[-1:] in "。？！" else text.rstrip("，、；：") + "。"
    return None if len(text) > LONGEST or COARSE.search(text) else text


def sources(work: Path) -> dict[str, Iterator[str]]:
    """Return the sentence sources, named like the English ones with the same use."""
    words = dictionary_words(next(unpacked(JIEBA, work).glob("**/jieba/dict.txt")))
    *usual, made = PATTERNS
    return {
        "examples": textbook(unpacked(HSK, work)),
        "everyday": everyday(EVERYDAY, 0, usual, WORDS | words),
        "made": everyday(DICTIONARY, 0, (made,), WORDS | words),
        "definitions": lists(words),
    }


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    known, frontend, normalize = set(phoneme_ids(args.work)), MandarinFrontend(args.work), normalizer()
    seen: set[str] = set()
    written: dict[str, int] = {}
    target = args.work / FILE
    with lines_to(target) as write:
        for source, texts in sources(args.work).items():
            written[source] = 0
            for text in texts:
                tidied = tidy(text)
                if tidied is None or tidied in seen:
                    continue
                seen.add(tidied)
                spoken = normalize(tidied)
                found = frontend(spoken) if SPEAKABLE.fullmatch(spoken) else None
                if found is not None and set(found[0]) <= known and len(found[0]) <= MOST_PHONEMES:
                    phonemes, words = found
                    write(MandarinSentence(tidied, spoken, phonemes, source, split_of(tidied), words))
                    written[source] += 1
            print(f"{source}: {written[source]}", flush=True)
    print(f"{target}: {sum(written.values())} sentences")


if __name__ == "__main__":
    main()
