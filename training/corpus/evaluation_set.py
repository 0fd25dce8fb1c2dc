"""Creates the evaluation sets: sentences and voices that are not used in training.

    python -m training.corpus.evaluation_set [--languages en zh] [--out build/evaluation]
        [--work build/train_mini]

Writes sets for scripts/evaluate.py and scripts/search_sampling.py, and the prompts of the voices in
`prompts/`:

    everyday.jsonl   200 lines: the sentences of light_tts/tools/evaluation/everyday.txt
    wordnet.jsonl    200 lines: examples of WordNet
    distinct.jsonl   the sentences of everyday.txt with voices that can be told apart, by which to judge
                     whether speech has the voice of its prompt rather than another's
    mandarin.jsonl   with zh: sentences of mandarin.jsonl in the work folder

Needs packages.py and sentences.py (with zh mandarin.py) to have run; the teacher speaks on the CPU.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from pathlib import Path

import soundfile
import torch

from light_tts.tools import evaluation
from training.corpus.mandarin import FILE as MANDARIN_FILE
from training.corpus.mandarin import MandarinFrontend
from training.corpus.packages import voices_folder
from training.corpus.sentences import phonemizer
from training.corpus.speakers import Speaker, speakers, style, voice_names
from training.corpus.teacher import SAMPLE_RATE, Teacher
from training.work import language_parser, read_lines

LINES = 200
EVERYDAY = Path(evaluation.__file__).with_name("everyday.txt")
# Speaker: what it says in its prompt, four to six seconds.
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
MANDARIN_PROMPTS = {
    "mandarin_zf_xiaoni": "昨天下午我和朋友去公园散步，那里的花都开了。",
    "mandarin_zm_yunyang": "他每天早上坐地铁上班，晚上回家给孩子做饭。",
    "mandarin_test_blend_0": "这家饭店的菜很好吃，价格也不贵，我们常常来。",
    "mandarin_test_blend_1": "外面下雨了，出门的时候别忘了带上你的雨伞。",
}


# Speaker: one of the teacher's voices that nothing is trained on (em_alex reads English with an accent), and
# the factor of its pitch and formants. Of four sentences that the teacher speaks with each, all 32 are more
# similar to the own prompt than to another's, by the measure of scripts/evaluate.py.
DISTINCT = {
    "af_sarah": ("af_sarah", 1.0),
    "am_fenrir": ("am_fenrir", 1.0),
    "bf_isabella": ("bf_isabella", 1.0),
    "am_fenrir_low": ("am_fenrir", 0.86),
    "af_sarah_high": ("af_sarah", 1.14),
    "bf_isabella_low": ("bf_isabella", 0.86),
    "am_fenrir_high": ("am_fenrir", 1.14),
    "em_alex": ("em_alex", 1.0),
}


def prompts(known: Mapping[str, Speaker]) -> Iterator[tuple[Speaker, str]]:
    """Yield each prompt recording: its speaker and its English text. known: held-out
    speakers by name."""
    for name, text in PROMPTS.items():
        yield known[name], text
    for name, text in distinct().items():
        voice, shift = DISTINCT[name]
        if name not in PROMPTS:
            yield Speaker(name, "shifted", {voice: 1.0}, shift, "test"), text


def distinct() -> dict[str, str]:
    """Voice: what it says in its prompt."""
    said = cycle(PROMPTS.values())
    return {name: PROMPTS.get(name, text) for name, text in zip(DISTINCT, said, strict=False)}


class Recorder:
    """Writes NAME.wav of each voice into `folder`."""

    def __init__(self, work: Path, folder: Path) -> None:
        self._teacher, self._voices = Teacher(work, torch.device("cpu")), voices_folder(work)
        self._folder = folder

    def record(self, speaker: Speaker, phonemes: str) -> None:
        spoken = self._teacher.speak(phonemes, style(self._voices, speaker), speaker.shift)
        wave = spoken.wave.clip(-1, 1)
        soundfile.write(self._folder / f"{speaker.name}.wav", wave, SAMPLE_RATE, subtype="PCM_16")
        print(f"{speaker.name}: {len(spoken.wave) / SAMPLE_RATE:.1f} s", flush=True)


def wordnet_texts(sentences: list[dict], seed: int = 0) -> list[str]:
    """Some of the examples that nothing is trained on."""
    held_out = [s["text"] for s in sentences if s["split"] == "test" and s["source"] == "examples"]
    return random.Random(seed).sample(held_out, LINES)


def everyday_texts(sentences: list[dict]) -> list[str]:
    """Ends the program where one of them is trained on."""
    texts = EVERYDAY.read_text("utf-8").splitlines()
    trained = {s["text"] for s in sentences if s["split"] == "train"}
    if known := sorted(trained.intersection(texts)):
        sys.exit(f"{EVERYDAY} has sentences that are trained on: {'; '.join(known)}")
    return texts


def lines(texts: Iterable[str], voices: Mapping[str, str] = PROMPTS) -> Iterator[dict[str, str]]:
    """The voices take turns. voices: what each says in its prompt."""
    for text, (voice, said) in zip(texts, cycle(voices.items()), strict=False):
        yield {"text": text, "prompt_wav": f"prompts/{voice}.wav", "prompt_text": said, "voice": voice}


def main() -> None:
    parser = language_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/evaluation"), help="folder of the sets")
    args = parser.parse_args()
    sentences = read_lines(args.work / "sentences.jsonl")
    everyday = everyday_texts(sentences)
    sets = {
        "everyday": lines(everyday),
        "wordnet": lines(wordnet_texts(sentences)),
        "distinct": lines(everyday, distinct()),
    }
    folder = args.out / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    found = speakers(voice_names(voices_folder(args.work)))
    known = {speaker.name: speaker for speaker in found if speaker.split == "test"}
    recorder, phonemize = Recorder(args.work, folder), phonemizer(args.work)
    for speaker, text in prompts(known):
        recorder.record(speaker, phonemize(text))
    if "zh" in args.languages:
        frontend = MandarinFrontend(args.work)
        for name, text in MANDARIN_PROMPTS.items():
            phonemes, _ = frontend(text) or sys.exit(f"no phonemes for {text}")
            recorder.record(known[name], phonemes)
        held_out = [s for s in read_lines(args.work / MANDARIN_FILE) if s["split"] == "test"]
        texts = [s["text"] for s in held_out if s["source"] == "examples"]
        sets["mandarin"] = lines(texts, MANDARIN_PROMPTS)
    for name, found_lines in sets.items():
        written = [json.dumps(line, ensure_ascii=False) for line in found_lines]
        (args.out / f"{name}.jsonl").write_text("\n".join(written) + "\n", "utf-8")
        print(f"{name}: {len(written)} lines")


if __name__ == "__main__":
    main()
