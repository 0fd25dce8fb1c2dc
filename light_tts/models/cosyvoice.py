"""Loads the components that are of the same kind in both CosyVoice families: front end and language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from light_tts.models.checkpoint.config import MAX_FRAMES, CommonConfig
from light_tts.models.numbers import ModelNumbers

if TYPE_CHECKING:
    import torch

    from light_tts.models.frontend.frontend import Frontend
    from light_tts.models.frontend.spellers import Spell
    from light_tts.models.llm.interface import Aligner
    from light_tts.models.llm.speech_lm import SpeechLM


class CosyVoice:
    """Implements the common part of `Family`. Components are imported when they are loaded, so no stage needs
    the packages of another."""

    def __init__(self, model_dir: Path, config: CommonConfig, lookahead_tokens: int, spoken_ids: int) -> None:
        """The last two are the flow's, see ModelNumbers."""
        self.numbers = ModelNumbers(
            sample_rate=config.sample_rate,
            samples_per_token=config.samples_per_token,
            frames_per_token=config.frames_per_token,
            samples_per_frame=config.samples_per_frame,
            chunk_tokens=config.chunk_size,
            lookahead_tokens=lookahead_tokens,
            spoken_ids=spoken_ids,
            max_speech_tokens=MAX_FRAMES // config.token_mel_ratio,
            sampling=config.llm.sampling,
            mix_ratio=config.llm.mix_ratio,
        )
        self._model_dir = model_dir
        self._common = config

    def load_frontend(self, spellers: dict[str, Spell], at_once: int) -> Frontend:
        from light_tts.models.frontend.frontend import Frontend

        return Frontend(self._model_dir, self._common, spellers, at_once)

    def load_llm(self, weights: Path, device: torch.device, dtype: torch.dtype) -> SpeechLM:
        from light_tts.models.llm.speech_lm import SpeechLM

        return SpeechLM.from_checkpoint(self._model_dir, weights, self._common, device, dtype)

    def load_aligner(self, model: SpeechLM) -> Aligner | None:
        from light_tts.models.llm.alignment import AttentionAligner

        heads = self._common.llm.alignment_heads
        return AttentionAligner(model, heads) if heads else None
