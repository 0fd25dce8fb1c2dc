"""Speaker similarity with Resemblyzer's voice embeddings; those of the same person are close together."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np

SHORTEST = 6_400  # samples; less than 0.4 s of voice does not identify a speaker


@cache
def _encoder() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about the location of scipy functions
        from resemblyzer import VoiceEncoder

    return VoiceEncoder("cpu", verbose=False)


def embed(wave16k: np.ndarray) -> np.ndarray | None:
    """Return (256,) float32 of length 1 for (samples,) float32 at 16 kHz, silences removed; None if there is
    hardly any voice. The dot product of two embeddings is their similarity, 0 to 1."""
    encoder = _encoder()
    from resemblyzer import preprocess_wav

    if not wave16k.any():
        return None
    voice = preprocess_wav(wave16k)
    return encoder.embed_utterance(voice) if len(voice) >= SHORTEST else None


def own_and_best_other(
    spoken: np.ndarray, prompts: dict[str, list[np.ndarray]], own: np.ndarray, voice: str
) -> tuple[float, float | None]:
    """Return (similarity to the own prompt, highest similarity to a prompt of a voice other than `voice`, or
    None if there is no other)."""
    others = [spoken @ prompt for name, found in prompts.items() if name != voice for prompt in found]
    return float(spoken @ own), float(max(others)) if others else None
