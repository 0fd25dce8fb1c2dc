"""Sampling parameters of one request (see light_tts/common/sampling.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Limits for requests; a checkpoint may exceed them.
MAX_TOP_K = 64
MAX_WIN_SIZE = 50


@dataclass(frozen=True)
class SamplingRule:
    """Repetition-aware sampling. `temperature` divides the scores. The nucleus is the smallest set of most
    probable tokens with a mass of at least `top_p`, but never more than `top_k` tokens. A token seen at least
    `win_size * tau_r` times in the last `win_size` tokens is resampled from the full distribution without it.
    """

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
        """Number of occurrences in the window from which a token is resampled."""
        return math.ceil(self.win_size * self.tau_r)


GREEDY = SamplingRule(top_p=1.0, top_k=1, win_size=1, tau_r=2.0)  # the most probable token, repeated or not
