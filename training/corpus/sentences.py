"""The sentences for the teacher: examples and definitions of WordNet, and generated ones with numbers, dates
and names and of everyday talk, in written form and as the teacher's phonemes.

    python -m training.corpus.sentences [--work build/train_mini]

Writes sentences.jsonl in the work folder: {"text", "spoken", "phonemes", "source", "split"} in each line.
`spoken` is the text as normalised by the server with wetext, which the language model reads and the teacher
says. `split` is "test" for held-out sentences; it depends only on the text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from light_tts.models.frontend.text import TextNormalizer
from light_tts.tools import evaluation
from training.corpus.everyday import everyday
from training.corpus.packages import PHONEMIZER, WORDNET, phoneme_ids, unpacked
from training.work import argument_parser, lines_to

SPEAKABLE = re.compile(r"[A-Za-z0-9 ,.;:'!?$-]+")
WORDS = range(4, 25)
JUDGED = Path(evaluation.__file__).with_name("everyday.txt")  # held out from training
EVERYDAY_WORDS = range(1, 41)
MADE, EVERYDAY = 6000, 9000
MOST_PHONEMES = 500  # the teacher supports 510
TEST_SHARE = 64  # one sentence in this many is held out
# Parts of words that the voice must not learn to say; the dictionary's examples include them.
COARSE = re.compile(r"\b(fuck|shit|cunt|nigg|whore|slut|rape|rapist|faggot|bitch|bastard|penis|vagina)", re.I)


@dataclass(frozen=True)
class Sentence:
    text: str
    spoken: str
    phonemes: str
    source: str
    split: str


def examples(wordnet: Path) -> Iterator[str]:
    """Yield sentences that show the use of a word."""
    for gloss in _glosses(wordnet, "noun", "verb", "adj", "adv"):
        yield from re.findall(r'"([^"]+)"', gloss)


def definitions(wordnet: Path) -> Iterator[str]:
    """Yield nouns with their definitions, which contain rarer words than the examples."""
    for line in _lines(wordnet, "noun"):
        head, _, gloss = line.partition("|")
        meaning = gloss.split(";")[0].strip()
        if meaning and not set('"()') & set(meaning):
            yield f"{head.split()[4].replace('_', ' ')} means {meaning}"


def made(count: int, seed: int = 0) -> Iterator[str]:
    """Yield sentences that dictionaries lack: numbers, times, dates, money, names, requests."""
    draw = random.Random(seed)
    names = [
        "Anna",
        "Ben",
        "Carla",
        "David",
        "Emma",
        "Frank",
        "Grace",
        "Henry",
        "Ivy",
        "Jack",
        "Kate",
        "Leo",
        "Maria",
        "Nora",
        "Oscar",
        "Paul",
        "Rosa",
        "Sam",
        "Tina",
        "Victor",
    ]
    cities = [
        "London",
        "Paris",
        "Rome",
        "Berlin",
        "Madrid",
        "Oslo",
        "Boston",
        "Chicago",
        "Sydney",
        "Toronto",
        "Dublin",
        "Vienna",
        "Lisbon",
    ]
    months = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ]
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    things = [
        "tickets",
        "books",
        "apples",
        "letters",
        "chairs",
        "bottles",
        "stones",
        "pictures",
        "boxes",
        "coins",
    ]
    patterns = (
        lambda: (
            f"{draw.choice(names)} bought {draw.randint(2, 999)} {draw.choice(things)} "
            f"in {draw.choice(cities)}."
        ),
        lambda: f"The train to {draw.choice(cities)} leaves at {draw.randint(1, 12)}:{draw.randint(10, 59)}.",
        lambda: f"It happened on {draw.choice(months)} {draw.randint(1, 28)}, {draw.randint(1700, 2030)}.",
        lambda: (
            f"That costs ${draw.randint(2, 900)}, which is {draw.randint(2, 60)} percent more than last year."
        ),
        lambda: (
            f"Please call {draw.choice(names)} on {draw.choice(days)} before {draw.randint(1, 12)} o'clock."
        ),
        lambda: f"Could you send the {draw.choice(things)} to {draw.choice(names)}, please?",
        lambda: f"Set a timer for {draw.randint(2, 90)} minutes and remind {draw.choice(names)}.",
        lambda: f"Hello {draw.choice(names)}, how was your trip to {draw.choice(cities)}?",
        lambda: f"There are {draw.randint(2, 20)} {draw.choice(things)} in room {draw.randint(100, 999)}.",
        lambda: (
            f"On {draw.choice(days)} we will meet in {draw.choice(cities)}, not in {draw.choice(cities)}!"
        ),
    )
    for _ in range(count):
        yield draw.choice(patterns)()


def tidy(text: str, words: range = WORDS) -> str | None:
    """Return the text as a sentence, or None if it is not suitable or its number of words is outside
    `words`.
    """
    text = text.strip().rstrip(";,").strip()
    if not SPEAKABLE.fullmatch(text) or len(text.split()) not in words or COARSE.search(text):
        return None
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


def split_of(text: str) -> str:
    digest = hashlib.sha256(text.lower().encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % TEST_SHARE == 0 else "train"


def _lines(wordnet: Path, *kinds: str) -> Iterator[str]:
    for kind in kinds:
        for line in (wordnet / "dict" / f"data.{kind}").read_text("latin1").splitlines():
            if not line.startswith("  "):  # the licence
                yield line


def _glosses(wordnet: Path, *kinds: str) -> Iterator[str]:
    for line in _lines(wordnet, *kinds):
        yield line.partition("|")[2]


def phonemizer(work: Path) -> Callable[[str], str]:
    """Return the function that converts text to the teacher's phonemes."""
    sys.path.insert(0, str(unpacked(PHONEMIZER, work)))
    from hibari import Hibari

    hibari = Hibari(threads=1)
    return lambda text: " ".join(hibari.phonemize(text))


def normalizer() -> Callable[[str], str]:
    """Return the function that converts text to the server's language model input. Exits without wetext."""
    if importlib.util.find_spec("wetext") is None:
        sys.exit("wetext is not installed, without which texts would stay as they are written")
    normalized = TextNormalizer(count_tokens=len)
    # As one piece: the server only splits text longer than any in training.
    return lambda text: "".join(normalized.split(text))


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    wordnet = unpacked(WORDNET, args.work)
    known = set(phoneme_ids(args.work))
    phonemize, normalize = phonemizer(args.work), normalizer()
    texts: dict[str, str] = {}
    judged = set(JUDGED.read_text("utf-8").splitlines())
    sources = {
        "examples": examples(wordnet),
        "made": made(MADE),
        "everyday": everyday(EVERYDAY),
        "definitions": definitions(wordnet),
    }
    for source, found in sources.items():
        words = EVERYDAY_WORDS if source == "everyday" else WORDS
        for text in found:
            if (tidied := tidy(text, words)) and tidied not in judged:
                texts.setdefault(tidied, source)
    begun = shown = time.monotonic()
    written = dict.fromkeys(sources, 0)
    target = args.work / "sentences.jsonl"
    with lines_to(target) as write:
        for number, (text, source) in enumerate(texts.items(), 1):
            spoken = normalize(text)
            phonemes = phonemize(spoken)
            if set(phonemes) <= known and 0 < len(phonemes) <= MOST_PHONEMES:
                write(Sentence(text, spoken, phonemes, source, split_of(text)))
                written[source] += 1
            if time.monotonic() > shown + 5 or number == len(texts):
                shown = time.monotonic()
                print(f"{number} of {len(texts)} sentences after {shown - begun:.0f} s", flush=True)
    print(f"{target}: " + ", ".join(f"{count} {source}" for source, count in written.items()))


if __name__ == "__main__":
    main()
