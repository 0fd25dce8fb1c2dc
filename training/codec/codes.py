"""Output of the speech tokenizer and the speaker encoder for the utterances, and for some of them with
simulated room acoustics: codes/NNNNN.npz and rooms/NNNNN.npz in the work folder, for speech/NNNNN.npz."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Code:
    """speech_token: (tokens,) int64, 25 per second; embedding: (192,) float32, of this recording's
    speaker.
    """

    speech_token: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True)
class Room:
    """An utterance with room acoustics: its code, and its mel (tokens, frames per token, mels) float16."""

    code: Code
    mel: np.ndarray


def codes_file(work: Path, shard: str) -> Path:
    """Return the path of the codes. shard: name of the speech file."""
    return work / "codes" / shard


def rooms_file(work: Path, shard: str) -> Path:
    return work / "rooms" / shard


def read_codes(work: Path) -> dict[str, Code]:
    """Return the codes of all shards by utterance id; may be empty."""
    return {name: code for arrays in _shards(work / "codes") for name, code in _codes(arrays)}


def read_rooms(work: Path) -> dict[str, Room]:
    """Return the rooms of all shards by utterance id; may be empty."""
    rooms = {}
    for arrays in _shards(work / "rooms"):
        mels = np.split(arrays["mel"], np.cumsum(arrays["tokens"])[:-1])
        rooms |= {name: Room(code, mel) for (name, code), mel in zip(_codes(arrays), mels, strict=True)}
    return rooms


def write_codes(path: Path, codes: Mapping[str, Code]) -> None:
    _write(path, _arrays(codes))


def write_rooms(path: Path, rooms: Mapping[str, Room]) -> None:
    """Write at least one room; each mel has as many tokens as the code."""
    mel = np.concatenate([room.mel for room in rooms.values()])
    _write(path, _arrays({name: room.code for name, room in rooms.items()}) | {"mel": mel})


def _shards(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    for path in sorted(folder.glob("?????.npz")):
        with np.load(path) as stored:
            yield {name: stored[name] for name in stored.files}


def _codes(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Code]]:
    tokens = np.split(arrays["speech_token"].astype(np.int64), np.cumsum(arrays["tokens"])[:-1])
    embeddings = arrays["embedding"].astype(np.float32)
    for name, token, embedding in zip(arrays["id"], tokens, embeddings, strict=True):
        yield str(name), Code(token, embedding)


def _arrays(codes: Mapping[str, Code]) -> dict[str, np.ndarray]:
    return {
        "id": np.array(list(codes)),
        "tokens": np.array([len(code.speech_token) for code in codes.values()]),
        "speech_token": np.concatenate([code.speech_token for code in codes.values()]).astype(np.uint16),
        "embedding": np.stack([code.embedding for code in codes.values()]).astype(np.float16),
    }


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write atomically, because other processes read the folder."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".part.npz")
    np.savez(unfinished, **arrays)
    unfinished.replace(path)
