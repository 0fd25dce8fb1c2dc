"""What the speech tokenizer and the speaker encoder make of the utterances: codes.npz in the work folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FILE_NAME = "codes.npz"


@dataclass(frozen=True)
class Code:
    """speech_token: (tokens,) int64, 25 a second; embedding: (192,) float32, of this recording's speaker."""

    speech_token: np.ndarray
    embedding: np.ndarray


def read_codes(work: Path) -> dict[str, Code]:
    """By the utterance's id; empty without a file."""
    path = work / FILE_NAME
    if not path.exists():
        return {}
    with np.load(path) as stored:
        ends = np.cumsum(stored["tokens"])[:-1]
        tokens = np.split(stored["speech_token"].astype(np.int64), ends)
        rows = zip(stored["id"], tokens, stored["embedding"].astype(np.float32), strict=True)
        return {str(name): Code(token, embedding) for name, token, embedding in rows}


def write_codes(work: Path, codes: dict[str, Code]) -> None:
    unfinished = work / f"{FILE_NAME}.part.npz"
    np.savez_compressed(
        unfinished,
        id=list(codes),
        tokens=[len(code.speech_token) for code in codes.values()],
        speech_token=np.concatenate([code.speech_token for code in codes.values()]).astype(np.uint16),
        embedding=np.stack([code.embedding for code in codes.values()]).astype(np.float16),
    )
    unfinished.replace(work / FILE_NAME)
