"""How the tokens of one request are drawn, in numbers (see light_tts/common/sampling.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

# What a request may ask for; a checkpoint may go beyond.
MAX_TOP_K = 64
MAX_WIN_SIZE = 50


@dataclass(frozen=True)
class SamplingRule:
    """Repetition-aware sampling: `temperature` divides the scores; the nucleus is the smallest set of most
    probable tokens with a mass of at least `top_p`, and never more than `top_k`; a token seen at least
    `win_size * tau_r` times in the last `win_size` is drawn again from the full distribution without it."""

    top_p: float
    top_k: int
    win_size: int
    tau_r: float
    temperature: float = 1.0

    @property
    def inverse_temperature(self) -> float:
        return 1.0 / self.temperature

    @property
    def repeats(self) -> int:
        """How often a token must have come up in the window to be drawn again."""
        return math.ceil(self.win_size * self.tau_r)


GREEDY = SamplingRule(top_p=1.0, top_k=1, win_size=1, tau_r=2.0)  # the most probable token, repeated or not
