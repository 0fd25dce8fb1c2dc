"""The speakers of the training data, derived from the teacher's voices: single voices, blends of two, and
both with shifted pitch and formants, which creates new speakers.

Measured on the teacher (similarity of speaker embeddings; word error rate of a recogniser): blends of two are
concentrated in the middle, shifts are new speakers even for the same voice; extrapolations (a + 0.35 (a - b))
are pronounced badly and not used.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Held out from training, also in blends.
HELD_OUT = ("af_sarah", "am_fenrir", "bf_isabella")
HELD_OUT_MANDARIN = ("zf_xiaoni", "zm_yunyang")  # neither do they read English
BLENDS, SHIFTED, TEST_BLENDS = 200, 200, 20
MORE_SHIFTED, WIDELY_SHIFTED = 400, 1200  # drawn after all others, which therefore do not change
FOREIGN = 15  # voices of other languages, which read English with an accent
SHIFTS, WIDE_SHIFTS = (0.85, 1.15), (0.8, 1.25)
MANDARIN_BLENDS, MANDARIN_SHIFTED, MANDARIN_TEST_BLENDS = 60, 100, 6
STYLE_SIZE = 256
# Fraction of the data spoken by each kind.
SHARES = {"plain": 0.2, "blend": 0.2, "shifted": 0.5, "foreign": 0.1}
MANDARIN_SHARES = {"mandarin": 0.8, "plain": 0.2}  # English voices read it with an accent


@dataclass(frozen=True)
class Speaker:
    """`voices`: the teacher's, with their weights; `shift`: factor of pitch and formants; `split`: train, or
    test for held-out speakers; `language`: en or zh, the language they speak in tests."""

    name: str
    kind: str
    voices: dict[str, float]
    shift: float = 1.0
    split: str = "train"
    language: str = "en"


def speakers(names: list[str], seed: int = 0) -> list[Speaker]:
    """Return all speakers, derived from the teacher's voices `names`."""
    draw = random.Random(seed)
    english = sorted(name for name in names if name[0] in "ab")
    trained = [name for name in english if name not in HELD_OUT]

    def blend(first: str, second: str) -> dict[str, float]:
        return blended(first, second, draw)

    def shifted(n: int, shifts: tuple[float, float] = SHIFTS) -> Speaker:
        voices = {draw.choice(trained): 1.0} if n % 2 else blend(*draw.sample(trained, 2))
        return Speaker(f"shifted_{n}", "shifted", voices, shift(draw, shifts))

    found = [Speaker(name, "plain", {name: 1.0}) for name in trained]
    found += [Speaker(f"blend_{n}", "blend", blend(*draw.sample(trained, 2))) for n in range(BLENDS)]
    found += [shifted(n) for n in range(SHIFTED)]
    foreign = sorted(name for name in names if name not in english)
    found += [Speaker(name, "foreign", {name: 1.0}) for name in draw.sample(foreign, FOREIGN)]
    found += [Speaker(name, "plain", {name: 1.0}, split="test") for name in HELD_OUT]
    for n in range(TEST_BLENDS):
        held_out = HELD_OUT[n % len(HELD_OUT)]
        voices = blend(held_out, draw.choice([name for name in english if name != held_out]))
        found.append(Speaker(f"test_blend_{n}", "blend", voices, split="test"))
    found += [shifted(SHIFTED + n) for n in range(MORE_SHIFTED)]
    found += [shifted(SHIFTED + MORE_SHIFTED + n, WIDE_SHIFTS) for n in range(WIDELY_SHIFTED)]
    return found + mandarin_speakers(names)


def mandarin_speakers(names: list[str], seed: int = 0) -> list[Speaker]:
    """Return the speakers derived from the Mandarin voices among `names`; empty without at least two training
    voices."""
    draw = random.Random(seed)
    mandarin = sorted(name for name in names if name[0] == "z")
    trained = [name for name in mandarin if name not in HELD_OUT_MANDARIN]
    if len(trained) < 2:
        return []

    def speaker(name: str, voices: dict[str, float], factor: float = 1.0, split: str = "train") -> Speaker:
        return Speaker(f"mandarin_{name}", "mandarin", voices, factor, split, "zh")

    found = [speaker(name, {name: 1.0}) for name in trained]
    for n in range(MANDARIN_BLENDS):
        found.append(speaker(f"blend_{n}", blended(*draw.sample(trained, 2), draw)))
    for n in range(MANDARIN_SHIFTED):
        voices = {draw.choice(trained): 1.0} if n % 2 else blended(*draw.sample(trained, 2), draw)
        found.append(speaker(f"shifted_{n}", voices, shift(draw)))
    held_out = [name for name in HELD_OUT_MANDARIN if name in mandarin]
    found += [speaker(name, {name: 1.0}, split="test") for name in held_out]
    for n in range(MANDARIN_TEST_BLENDS if held_out else 0):
        voices = blended(held_out[n % len(held_out)], draw.choice(trained), draw)
        found.append(speaker(f"test_blend_{n}", voices, split="test"))
    return found


def blended(first: str, second: str, draw: random.Random) -> dict[str, float]:
    weight = round(draw.uniform(0.3, 0.7), 3)
    return {first: weight, second: round(1 - weight, 3)}


def shift(draw: random.Random, shifts: tuple[float, float] = SHIFTS) -> float:
    """Draw a shift far enough from 1 to be another speaker."""
    low, high = shifts
    return round(draw.choice((draw.uniform(low, 0.95), draw.uniform(1.05, high))), 3)


def voice_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.bin"))


def style(folder: Path, speaker: Speaker) -> np.ndarray:
    """Return (lengths, STYLE_SIZE) float32: row n is for texts of n + 1 phonemes. Voice files contain only
    float32."""
    return sum(
        weight * np.fromfile(folder / f"{voice}.bin", np.float32).reshape(-1, STYLE_SIZE)
        for voice, weight in speaker.voices.items()
    )
