"""Compares the checkpoint's word times with the teacher's.

    python -m training.lm.word_times [--count 40] [--checkpoint FOLDER] [--work build/train_mini]

The teacher speaks everyday sentences with held-out voices on the CPU and reports each phoneme's duration. The
checkpoint's language model reads the text and the tokens of that speech, and its aligner determines when each
word begins and ends, in steps of a token (40 ms). Requires packages.py to have run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from light_tts.models.family import load_family
from light_tts.models.llm.alignment import times_of_words
from training.corpus.corpus import LATE
from training.corpus.evaluation_set import EVERYDAY, PROMPTS
from training.corpus.packages import voices_folder
from training.corpus.sentences import phonemizer
from training.corpus.speakers import speakers, style, voice_names
from training.corpus.teacher import SAMPLE_RATE, Speech, Teacher
from training.lm.words import TOKEN_RATE
from training.work import argument_parser


def spans_of_words(phonemes: str, speech: Speech) -> np.ndarray:
    """-> (words, 2): when each word of the phonemes begins and ends, in seconds as it is heard. A blank
    belongs to neither of its neighbours."""
    ends = np.cumsum(speech.durations) - LATE  # of the silence before, the phonemes, the silence behind
    spans, begun = [], None
    for number, phoneme in enumerate([*phonemes, " "]):
        if phoneme == " ":
            if begun is not None:
                spans.append((begun, ends[number]))  # the end of the phoneme before
            begun = None
        elif begun is None:
            begun = ends[number]
    return np.array(spans)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=40, help="sentences")
    parser.add_argument("--checkpoint", type=Path, default=Path("pretrained_models/light-tts-mini"))
    args = parser.parse_args()
    family = load_family(args.checkpoint)
    frontend = family.load_frontend({}, 1)
    device = torch.device("cpu")
    model = family.load_llm(args.checkpoint / "llm.pt", device, torch.float32)
    align = family.load_aligner(model)
    if align is None:
        parser.error(f"{args.checkpoint}: its configuration names no alignment_heads")
    teacher, phonemize, folder = Teacher(args.work, device), phonemizer(args.work), voices_folder(args.work)
    known = {speaker.name: speaker for speaker in speakers(voice_names(folder))}
    found, left_out = [], 0
    for number, text in enumerate(EVERYDAY.read_text("utf-8").splitlines()[: args.count]):
        speaker = known[list(PROMPTS)[number % len(PROMPTS)]]
        phonemes = phonemize(text)
        speech = teacher.speak(phonemes, style(folder, speaker), speaker.shift)
        expected = spans_of_words(phonemes, speech)
        (ids,) = frontend.split_text(text)
        words = [count for _, count in frontend.words(ids)]
        if len(words) != len(expected):
            left_out += 1
            continue
        tokens = frontend.features(speech.wave, SAMPLE_RATE).speech_token.tolist()
        inputs = [model.ids.sos, *ids, model.ids.task, *map(model.ids.speech, tokens)]
        first = 2 + len(ids)
        share = align(inputs, range(1, 1 + len(ids)), range(first, len(inputs)), words)
        times = times_of_words(share)
        found.append(np.abs(np.array(times).reshape(-1, 2) / TOKEN_RATE - expected))
    error = 1000 * np.concatenate(found)
    for name, column in zip(("beginning", "end"), error.T, strict=True):
        median, ninety = np.percentile(column, (50, 90))
        print(f"{name} of a word: median {median:.0f} ms, 90 % within {ninety:.0f} ms off")
    print(f"{len(error)} words of {len(found)} sentences; {left_out} left out, whose words differ in number")


if __name__ == "__main__":
    main()
