"""Speaker embeddings of recordings (campplus.onnx), and the voices stored in spk2info.pt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from light_tts.common.prompt_features import PromptFeatures
from light_tts.models.checkpoint.config import CommonConfig
from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.models.frontend.features import kaldi_fbank
from light_tts.models.frontend.onnx import OnnxModel

SPEAKERS_FILE = "spk2info.pt"


class OnnxSpeakerEncoder:
    FILE_NAME = "campplus.onnx"

    def __init__(self, model_dir: Path) -> None:
        self._model = OnnxModel(model_dir / self.FILE_NAME, inputs=1)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """samples: (n,) float32 at 16 kHz. Returns (192,) float32."""
        return self._model.run([kaldi_fbank(samples)[None]]).reshape(-1).astype(np.float32)


@dataclass(frozen=True)
class StoredSpeaker:
    """A voice of the checkpoint. `prompt_text_ids`: transcript of the recording it was created from; empty if
    there is only an embedding."""

    features: PromptFeatures
    prompt_text_ids: list[int]


def load_speakers(model_dir: Path, config: CommonConfig) -> dict[str, StoredSpeaker]:
    """Return the voices in spk2info.pt by name; empty if the file is missing. Raises CheckpointError."""
    path = model_dir / SPEAKERS_FILE
    if not path.is_file():
        return {}
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        items = list(stored.items())
    except Exception as error:  # torch.load raises a dozen types for a bad file
        raise CheckpointError(f"{path}: expected a dictionary of speakers: {type(error).__name__}") from error
    return {str(name): _speaker(path, str(name), entry, config) for name, entry in items}


def _speaker(path: Path, name: str, entry: Any, config: CommonConfig) -> StoredSpeaker:
    def values(key: str, dtype: torch.dtype, *tail: int) -> np.ndarray:
        """Return entry[key] as (..., *tail) without the batch dimension."""
        try:
            return torch.as_tensor(entry[key]).to(dtype).reshape(-1, *tail).numpy()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: speaker {name!r}: {key}: {error!r}") from None

    mels, width = config.mel.num_mels, config.spk_embed_dim
    if isinstance(entry, dict) and "embedding" in entry:
        embedding = values("embedding", torch.float32)
        features = PromptFeatures(np.zeros(0, np.int32), np.zeros((0, mels), np.float32), embedding)
        speaker = StoredSpeaker(features, [])
    else:
        features = PromptFeatures(
            values("flow_prompt_speech_token", torch.int32),
            values("prompt_speech_feat", torch.float32, mels),
            values("flow_embedding", torch.float32),
        )
        text_ids = values("prompt_text", torch.int64).tolist()
        speaker = StoredSpeaker(features, text_ids)
    if len(features.embedding) != width:
        raise CheckpointError(
            f"{path}: speaker {name!r}: expected an embedding of {width} values, "
            f"found {len(features.embedding)}"
        )
    if len(features.mel) != config.token_mel_ratio * len(features.speech_token):
        raise CheckpointError(
            f"{path}: speaker {name!r}: {len(features.mel)} mel frames do not fit "
            f"{len(features.speech_token)} speech tokens"
        )
    return speaker
