"""The teacher's speech, held entirely in device memory: an hour takes 170 MB."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.corpus.packages import phoneme_ids
from training.work import read_lines

SAMPLE_RATE = 24_000
LABEL_RATE = 50  # phonemes and F0 values per second, the rate of mel frames
# The teacher speaks this many seconds earlier than its durations say. Measured: mel frames of the same
# phoneme are most similar with this offset; the teacher's own timestamps use 0.075.
LATE = 0.0625
SILENCE = 0  # label before and after the phonemes
READERS = 8  # threads


@dataclass(frozen=True)
class Labels:
    """phoneme: (frames,) int64, ids of the teacher, with SILENCE around; f0: (frames,) float32 in Hz, 0 where
    unvoiced. All utterances are concatenated."""

    phoneme: Tensor
    f0: Tensor


class Corpus:
    """Utterances with their speech. `wave`: (samples,) int16, all concatenated; `start`, `samples`:
    (utterances,) int64, position and length in it; `label_start`, `frames`: likewise in the labels.
    `speaker`: (utterances,) int64, index into `speakers`. All tensors are on the device."""

    def __init__(
        self, utterances: list[dict], waves: list[np.ndarray], labels: list[tuple], device: torch.device
    ) -> None:
        self.utterances, self.device = utterances, device
        self.speakers = sorted({utterance["speaker"] for utterance in utterances})
        numbers = {name: number for number, name in enumerate(self.speakers)}

        def to_device(values) -> Tensor:
            return torch.as_tensor(values, dtype=torch.int64).to(device)

        self.speaker = to_device([numbers[utterance["speaker"]] for utterance in utterances])
        sizes, frames = [len(wave) for wave in waves], [len(f0) for _, f0 in labels]
        self.samples, self.start = to_device(sizes), to_device(_starts(sizes))
        self.frames, self.label_start = to_device(frames), to_device(_starts(frames))
        self.wave = torch.empty(sum(sizes), dtype=torch.int16, device=device)
        for place, wave in zip(self.wave.split(sizes), waves, strict=True):
            place.copy_(torch.from_numpy(wave))
        self.labels = Labels(
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(p for p, _ in labels)])).to(device),
            torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(f0 for _, f0 in labels)])).to(device),
        )

    @classmethod
    def load(
        cls, work: Path, device: torch.device, split: str = "train", shards: int | None = None
    ) -> Corpus:
        """Load the existing shards, or the first `shards` of them. Raises FileNotFoundError if there are
        none."""
        known = {u["id"]: u for u in read_lines(work / "utterances.jsonl") if u["split"] == split}
        corpus = cls.read(speech_files(work)[:shards], known, phoneme_ids(work), device)
        if not len(corpus):
            raise FileNotFoundError(f"{work / 'speech'}: no speech of split {split!r}: run generate.py first")
        return corpus

    @classmethod
    def read(
        cls, files: Sequence[Path], known: Mapping[str, dict], ids: Mapping[str, int], device: torch.device
    ) -> Corpus:
        """Read these shards, restricted to the utterances in `known` (by id). ids: of the phonemes."""

        def read(file: Path) -> list[tuple[dict, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
            with np.load(file) as shard:
                names = [str(name) for name in shard["id"]]
                if not any(name in known for name in names):
                    return []
                waves, durations, f0s = (
                    np.split(shard[values], np.cumsum(shard[sizes])[:-1])
                    for values, sizes in (("wave", "samples"), ("durations", "phonemes"), ("f0", "steps"))
                )
            found = []
            for name, wave, seconds, f0 in zip(names, waves, durations, f0s, strict=True):
                if name in known:
                    phonemes = [ids[phoneme] for phoneme in known[name]["phonemes"]]
                    spoken = np.asarray([SILENCE, *phonemes, SILENCE])
                    found.append((known[name], wave, _frame_labels(len(wave), spoken, seconds, f0)))
            return found

        with ThreadPoolExecutor(READERS) as readers:
            found = [one for shard in readers.map(read, files) for one in shard]
        utterances, waves, labels = ([one[part] for one in found] for part in range(3))
        return cls(utterances, waves, labels, device)

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def seconds(self) -> float:
        return len(self.wave) / SAMPLE_RATE

    def waves(self) -> Iterator[Tensor]:
        """Yield (samples,) float32 of each utterance."""
        for wave in self.wave.split(self.samples.tolist()):
            yield wave.float() / 32768

    def crops(self, index: Tensor, begin: Tensor, samples: int) -> Tensor:
        """index: (batch,) utterances; begin: (batch,) first sample in each, may be negative -> (batch,
        samples) float32, zero outside the utterance. Does not synchronize."""
        position = begin[:, None] + torch.arange(samples, device=self.device)
        inside = (position >= 0) & (position < self.samples[index][:, None])
        flat = (self.start[index][:, None] + position).clamp(0, len(self.wave) - 1)
        return torch.where(inside, self.wave[flat].float() / 32768, 0.0)

    def label_crops(self, index: Tensor, begin: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """index: (batch,); begin: (batch,) first frame -> phoneme (batch, frames), f0 (batch, frames), and
        bool (batch, frames), whether the frame is inside the utterance."""
        position = begin[:, None] + torch.arange(frames, device=self.device)
        inside = (position >= 0) & (position < self.frames[index][:, None])
        flat = (self.label_start[index][:, None] + position).clamp(0, len(self.labels.f0) - 1)
        phoneme = torch.where(inside, self.labels.phoneme[flat], SILENCE)
        return phoneme, torch.where(inside, self.labels.f0[flat], 0.0), inside


def heard_at(times: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """Return the indices of the phonemes spoken at each of `times`, in seconds from the beginning of the
    speech; durations in seconds."""
    return np.searchsorted(np.cumsum(durations), times + LATE).clip(max=len(durations) - 1)


def speech_files(work: Path) -> list[Path]:
    """Return the existing shards in order."""
    return sorted((work / "speech").glob("?????.npz"))


def _starts(sizes: list[int]) -> list[int]:
    return [0, *np.cumsum(sizes)[:-1].tolist()]


def _frame_labels(
    samples: int, phonemes: np.ndarray, durations: np.ndarray, f0: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """durations: (phonemes,) seconds; f0: (steps,) equally spaced over the waveform -> phoneme (frames,)
    int64 and f0 (frames,) float32 at the middle of each frame."""
    times = (np.arange(samples * LABEL_RATE // SAMPLE_RATE) + 0.5) / LABEL_RATE
    spoken = heard_at(times, durations)
    steps = (times * len(f0) * SAMPLE_RATE / samples).astype(np.int64).clip(max=len(f0) - 1)
    return phonemes[spoken].astype(np.int64), f0[steps].astype(np.float32)
