"""Input of the engine: chunks to speak, the parts they belong to, and their voices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from light_tts.common.prompt_features import PromptFeatures
from light_tts.engine.speech.chunk_planner import Chunk
from light_tts.models.flow.memos import Memo
from light_tts.models.vocoder.interface import CausalState


@dataclass(frozen=True)
class Voice:
    """A prompt. speech_token: (n,) int32 on the host; mel: (frames, mel channels) and embedding: (size,) on
    the device; memo: used by the flow."""

    speech_token: np.ndarray
    mel: Tensor
    embedding: Tensor
    memo: Memo = field(default_factory=Memo)

    @classmethod
    def of(cls, features: PromptFeatures, device: torch.device | str) -> Voice:
        """Create a voice from a copy of the features: shared memory may be read-only."""

        def on_device(array: np.ndarray) -> Tensor:
            return torch.tensor(array, dtype=torch.float32).to(device)

        tokens = np.array(features.speech_token, dtype=np.int32)
        return cls(tokens, on_device(features.mel), on_device(features.embedding))


@dataclass(frozen=True)
class Tail:
    """State that `FadedVocoding` passes to the next chunk. mel: (mel channels, OVERLAP_FRAMES); source,
    speech: (samples,) for these frames; the speech has not been delivered yet."""

    mel: Tensor
    source: Tensor
    speech: Tensor


@dataclass
class SpeechState:
    """State of one part. `seed` and `part` determine the noise of the source; seed None: no noise. `speed`
    other than 1 is for parts that are one chunk. `tail`, `causal`: what the last chunk passes to the next
    one: the former with `FadedVocoding`, the latter with `CausalVocoding`. memo: used by the flow."""

    voice: Voice
    seed: int | None
    part: int = 0
    speed: float = 1.0
    tail: Tail | None = None
    causal: CausalState | None = None
    memo: Memo = field(default_factory=Memo)


@dataclass(frozen=True)
class WorkItem:
    """Speak `chunk` of a part. tokens: the part's ids from its start, at least up to `chunk.context_end`, all
    below the flow's vocabulary size. `stream`: whether the part is spoken in chunks."""

    state: SpeechState
    tokens: Sequence[int]
    chunk: Chunk
    stream: bool

    @property
    def is_first(self) -> bool:
        """Whether a client has heard nothing before it."""
        return self.stream and self.state.part == 0 and self.chunk.start == 0
