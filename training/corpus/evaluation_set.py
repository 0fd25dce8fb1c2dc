"""Creates the evaluation sets: sentences and voices that are not used in training.

    python -m training.corpus.evaluation_set [--out build/evaluation] [--work build/train_mini]

Writes two sets for scripts/evaluate.py and scripts/search_sampling.py, `everyday.jsonl` (the sentences of
light_tts/tools/evaluation/everyday.txt) and `wordnet.jsonl` (examples of WordNet), 200 lines each, and the
prompts of the voices in `prompts/`. Requires packages.py and sentences.py to have run; the teacher runs on
the CPU.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path

import soundfile
import torch

from light_tts.tools import evaluation
from training.corpus.packages import voices_folder
from training.corpus.sentences import phonemizer
from training.corpus.speakers import speakers, style, voice_names
from training.corpus.teacher import SAMPLE_RATE, Teacher
from training.work import argument_parser, read_lines

LINES = 200
EVERYDAY = Path(evaluation.__file__).with_name("everyday.txt")
# Speaker -> the text of its prompt, four to six seconds.
PROMPTS = {
    "af_sarah": "The garden behind the house was full of roses, and the gate was always open.",
    "am_fenrir": "On Sunday we took the early train to the coast and walked along the beach.",
    "bf_isabella": "There was a small table near the window, with two cups and a pot of tea.",
    "test_blend_0": "My sister lives in a quiet street, not very far from the public library.",
    "test_blend_1": "He closed the book, looked at the clock, and went to find his coat.",
    "test_blend_2": "In the evening the lights of the harbor could be seen from the kitchen.",
    "test_blend_4": "They sold the boat last winter, and bought a piece of land in the hills.",
    "test_blend_7": "We had lunch under the trees and watched the people on the other side.",
}


def record(work: Path, folder: Path) -> None:
    """Write NAME.wav of every voice."""
    teacher, phonemize, voices = Teacher(work, torch.device("cpu")), phonemizer(work), voices_folder(work)
    known = {speaker.name: speaker for speaker in speakers(voice_names(voices)) if speaker.split == "test"}
    for name, text in PROMPTS.items():
        speaker = known[name]
        spoken = teacher.speak(phonemize(text), style(voices, speaker), speaker.shift)
        soundfile.write(folder / f"{name}.wav", spoken.wave.clip(-1, 1), SAMPLE_RATE, subtype="PCM_16")
        print(f"{name}: {len(spoken.wave) / SAMPLE_RATE:.1f} s", flush=True)


def wordnet_texts(sentences: list[dict], seed: int = 0) -> list[str]:
    """Return some examples that are not used in training."""
    held_out = [s["text"] for s in sentences if s["split"] == "test" and s["source"] == "examples"]
    return random.Random(seed).sample(held_out, LINES)


def everyday_texts(sentences: list[dict]) -> list[str]:
    """Return the sentences; exits if one of them is used in training."""
    texts = EVERYDAY.read_text("utf-8").splitlines()
    trained = {s["text"] for s in sentences if s["split"] == "train"}
    if known := sorted(trained.intersection(texts)):
        sys.exit(f"{EVERYDAY} has sentences that are trained on: {'; '.join(known)}")
    return texts


def lines(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield lines that cycle through the voices."""
    for text, (voice, said) in zip(texts, cycle(PROMPTS.items()), strict=False):
        yield {"text": text, "prompt_wav": f"prompts/{voice}.wav", "prompt_text": said, "voice": voice}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/evaluation"), help="folder of the sets")
    args = parser.parse_args()
    sentences = read_lines(args.work / "sentences.jsonl")
    prompts = args.out / "prompts"
    prompts.mkdir(parents=True, exist_ok=True)
    record(args.work, prompts)
    for name, texts in (("everyday", everyday_texts(sentences)), ("wordnet", wordnet_texts(sentences))):
        written = [json.dumps(line, ensure_ascii=False) for line in lines(texts)]
        (args.out / f"{name}.jsonl").write_text("\n".join(written) + "\n", "utf-8")
        print(f"{name}: {len(written)} lines")


if __name__ == "__main__":
    main()
