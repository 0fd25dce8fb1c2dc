"""Writes the list of training utterances: texts and their speakers.

    python -m training.corpus.utterances [--hours 20] [--seed 0] [--languages en zh] [--work build/train_mini]

Writes utterances.jsonl in the work folder: {"id", "text", "spoken", "phonemes", "speaker", "split"}, and
"words" (as mandarin.jsonl has them) in those in Mandarin, whose ids begin with z. They are in the order in
which they are to be spoken, so that any beginning of it is a fair sample. Sentences are joined, so that there
are short utterances and long ones; of two languages Mandarin has the share MANDARIN of the hours. Another
`--seed` gives other utterances to train with; those to test with stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.corpus.mandarin import FILE as MANDARIN_FILE
from training.corpus.packages import voices_folder
from training.corpus.speakers import MANDARIN_SHARES, SHARES, Speaker, speakers, voice_names
from training.work import language_parser, lines_to, read_lines

PHONEMES_A_SECOND = 14.0  # of the teacher, including stress marks and spaces
LONGEST = 12.0  # seconds
TEST_UTTERANCES = 600
# fraction of training utterances that begin with a definition: rare words, monotonous grammar
DEFINITIONS = 0.3
EVERYDAY = 0.2  # fraction of those that begin with everyday talk,
ALONE = 0.5  # of which this fraction has nothing else: as short as one word
MANDARIN = 0.4  # fraction of the hours


@dataclass(frozen=True)
class CorpusUtterance:
    id: str
    text: str
    spoken: str
    phonemes: str
    speaker: str
    split: str

    @property
    def seconds(self) -> float:
        """Return the estimated duration."""
        return len(self.phonemes) / PHONEMES_A_SECOND


@dataclass(frozen=True)
class MandarinUtterance(CorpusUtterance):
    words: str


class Deck:
    """Deals all its cards before repeating one."""

    def __init__(self, cards: list, draw: random.Random) -> None:
        self._cards, self._draw, self._left = cards, draw, []

    def __len__(self) -> int:
        return len(self._cards)

    def deal(self):
        if not self._left:
            self._left = self._cards[:]
            self._draw.shuffle(self._left)
        return self._left.pop()


def training_utterances(
    sentences: list[dict],
    voices: list[Speaker],
    hours: float,
    seed: int = 0,
    shares: Mapping[str, float] = SHARES,
) -> Iterator[CorpusUtterance]:
    """sentences: of one language; shares: fractions of the kinds of speakers."""
    draw = random.Random(seed)
    decks = {
        kind: Deck([v for v in voices if v.kind == kind and v.split == "train"], draw) for kind in shares
    }
    train = [sentence for sentence in sentences if sentence["split"] == "train"]
    definitions = Deck([s for s in train if s["source"] == "definitions"], draw)
    everyday = Deck([s for s in train if s["source"] == "everyday"], draw)
    others = Deck([s for s in train if s["source"] != "definitions"], draw)
    following = others.deal()
    seconds, number = 0.0, 0
    while seconds < hours * 3600:
        (kind,) = draw.choices(list(shares), list(shares.values()))
        wanted = draw.uniform(2.0, LONGEST)
        begins = draw.random()
        if begins < DEFINITIONS:
            parts = [definitions.deal()]
        elif begins < DEFINITIONS + EVERYDAY and everyday:
            parts = [everyday.deal()]
            wanted = 0.0 if draw.random() < ALONE else wanted
        else:
            parts, following = [following], others.deal()
        while sum(len(part["phonemes"]) for part in [*parts, following]) <= wanted * PHONEMES_A_SECOND:
            parts.append(following)
            following = others.deal()
        name = f"{seed:02}-{number:06}" if seed else f"{number:06}"
        utterance = joined(name, parts, decks[kind].deal().name, "train")
        if utterance.seconds <= LONGEST:
            yield utterance
            seconds += utterance.seconds
            number += 1


def joined(name: str, parts: Sequence[dict], speaker: str, split: str) -> CorpusUtterance:
    """Return the sentences `parts`, of one language, as one utterance."""

    def all_of(field: str, between: str = " ") -> str:
        return between.join(part[field] for part in parts)

    if "words" not in parts[0]:
        return CorpusUtterance(name, all_of("text"), all_of("spoken"), all_of("phonemes"), speaker, split)
    texts = (all_of("text", ""), all_of("spoken", ""), all_of("phonemes"))
    return MandarinUtterance(f"z{name}", *texts, speaker, split, all_of("words"))


def held_out_utterances(
    sentences: list[dict], voices: list[Speaker], seed: int = 1
) -> Iterator[CorpusUtterance]:
    """Yield single held-out sentences by held-out speakers, for measurements and their prompts. Both of one
    language."""
    draw = random.Random(seed)
    held_out = [s for s in sentences if s["split"] == "test" and s["source"] == "examples"]
    deck = Deck([voice for voice in voices if voice.split == "test"], draw)
    for number, sentence in enumerate(draw.sample(held_out, min(TEST_UTTERANCES, len(held_out)))):
        yield joined(f"t{number:05}", [sentence], deck.deal().name, "test")


def interleaved(parts: Sequence[Sequence[CorpusUtterance]]) -> list[CorpusUtterance]:
    """Merge the parts, each in its order, so that every beginning has the same proportions."""
    places = [
        (number / len(part), which, utterance)
        for which, part in enumerate(parts)
        for number, utterance in enumerate(part)
    ]
    return [utterance for *_, utterance in sorted(places, key=lambda place: place[:2])]


def main() -> None:
    parser = language_parser(__doc__)
    parser.add_argument("--hours", type=float, default=20.0, help="of training data, about")
    parser.add_argument("--seed", type=int, default=0, help="other utterances to train with for each")
    args = parser.parse_args()
    voices = speakers(voice_names(voices_folder(args.work)))
    sources = {
        "en": ("sentences.jsonl", SHARES, 1 - MANDARIN),
        "zh": (MANDARIN_FILE, MANDARIN_SHARES, MANDARIN),
    }
    test, train = [], []
    for language in args.languages:
        file, shares, share = sources[language]
        hours = args.hours * (share if len(args.languages) > 1 else 1.0)
        sentences = read_lines(args.work / file)
        own = [voice for voice in voices if voice.language == language]
        test.append(list(held_out_utterances(sentences, own)))
        train.append(list(training_utterances(sentences, voices, hours, args.seed, shares)))
    target = args.work / "utterances.jsonl"
    total = dict.fromkeys(("test", "train"), 0.0)
    with lines_to(target) as write:
        for utterance in (*interleaved(test), *interleaved(train)):
            write(utterance)
            total[utterance.split] += utterance.seconds / 3600
    print(f"{target}: {total['train']:.1f} h to train with, {total['test']:.1f} h to test with (estimated)")


if __name__ == "__main__":
    main()
