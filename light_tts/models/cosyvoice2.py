"""The CosyVoice2 family: its components, and its parameters from `cosyvoice2.yaml`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from light_tts.common.sampling_rule import SamplingRule
from light_tts.models.checkpoint.config import load_config

if TYPE_CHECKING:
    import torch

    from light_tts.models.flow.interface import FlowBackend
    from light_tts.models.frontend.frontend import Frontend
    from light_tts.models.frontend.spellers import Spell
    from light_tts.models.llm.interface import Aligner
    from light_tts.models.llm.speech_lm import SpeechLM
    from light_tts.models.vocoder.interface import Vocoder


class CosyVoice2:
    """Implements `Family`. Components are imported when they are loaded, so no stage needs the packages of
    another."""

    def __init__(self, model_dir: Path) -> None:
        """Raises ConfigError naming the file and the key."""
        self._model_dir = model_dir
        self._config = load_config(model_dir)

    @property
    def sample_rate(self) -> int:
        return self._config.sample_rate

    @property
    def samples_per_token(self) -> int:
        return self._config.samples_per_token

    @property
    def frames_per_token(self) -> int:
        return self._config.frames_per_token

    @property
    def samples_per_frame(self) -> int:
        return self._config.samples_per_frame

    @property
    def chunk_tokens(self) -> int:
        return self._config.chunk_size

    @property
    def lookahead_tokens(self) -> int:
        return self._config.flow.pre_lookahead_len

    @property
    def spoken_ids(self) -> int:
        return self._config.flow.vocab_size

    @property
    def max_speech_tokens(self) -> int:
        from light_tts.models.flow.cfm import MAX_FRAMES

        return MAX_FRAMES // self._config.token_mel_ratio

    @property
    def sampling(self) -> SamplingRule:
        return self._config.llm.sampling

    @property
    def mix_ratio(self) -> tuple[int, int]:
        return self._config.llm.mix_ratio

    def load_frontend(self, spellers: dict[str, Spell], at_once: int) -> Frontend:
        from light_tts.models.frontend.frontend import Frontend

        return Frontend(self._model_dir, self._config, spellers, at_once)

    def load_llm(self, weights: Path, device: torch.device, dtype: torch.dtype) -> SpeechLM:
        from light_tts.models.llm.speech_lm import SpeechLM

        return SpeechLM.from_checkpoint(self._model_dir, weights, self._config, device, dtype)

    def load_aligner(self, model: SpeechLM) -> Aligner | None:
        from light_tts.models.llm.alignment import AttentionAligner

        heads = self._config.llm.alignment_heads
        return AttentionAligner(model, heads) if heads else None

    def load_flow(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        load_trt: bool,
        max_batch_size: int,
        memory: int,
        gpu_memory: int,
        n_timesteps: int | None,
    ) -> Callable[[], FlowBackend]:
        from light_tts.models.flow.backend import choose_flow

        config = self._config
        if n_timesteps is not None:
            config = replace(config, flow=replace(config.flow, n_timesteps=n_timesteps))
        return choose_flow(
            self._model_dir, config, device, dtype, load_trt, max_batch_size, memory, gpu_memory
        )

    def load_vocoder(self, device: torch.device, cached_frames: int) -> Callable[[], Vocoder]:
        from light_tts.models.vocoder.backend import choose_vocoder
        from light_tts.models.vocoder.hift import Hift

        hift = Hift.from_checkpoint(self._model_dir, self._config, device)
        return choose_vocoder(hift, cached_frames * hift.samples_per_frame)
