"""The CosyVoice2 family: its components, and its parameters from `cosyvoice2.yaml`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from light_tts.models.checkpoint.cosyvoice2_config import YAML_NAME, load_config
from light_tts.models.cosyvoice import CosyVoice
from light_tts.models.flow_options import FlowOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from light_tts.models.flow.base import BaseFlow
    from light_tts.models.flow.interface import FlowBackend
    from light_tts.models.vocoder.interface import Vocoder


class CosyVoice2(CosyVoice):
    """Implements `Family`."""

    name = "CosyVoice2"
    files = (
        YAML_NAME,
        "flow.pt",
        "hift.pt",
        "campplus.onnx",
        "speech_tokenizer_v2.onnx",
        "CosyVoice-BlankEN",
    )

    def __init__(self, model_dir: Path) -> None:
        """Raises ConfigError naming the file and the key."""
        self._config = config = load_config(model_dir)
        super().__init__(model_dir, config, config.flow.pre_lookahead_len, config.flow.vocab_size)

    def load_flow(
        self,
        device: torch.device,
        dtype: torch.dtype,
        options: FlowOptions,
        ended: Callable[[str], None] = lambda phase: None,
    ) -> Callable[[], FlowBackend]:
        from light_tts.models.flow.backend import choose_flow

        ended("imports")
        return choose_flow(self._model_dir, self._config, device, dtype, options, ended)

    def load_vocoder(self, device: torch.device, cached_frames: int) -> Callable[[], Vocoder]:
        from light_tts.models.vocoder.backend import choose_vocoder
        from light_tts.models.vocoder.hift import Hift

        hift = Hift.from_checkpoint(self._model_dir, self._config, device)
        return choose_vocoder(hift, cached_frames * hift.samples_per_frame)

    def read_flow(self) -> BaseFlow:
        import torch

        from light_tts.models.flow.flow import Flow

        return Flow.from_checkpoint(self._model_dir, self._config, torch.device("cpu"))

    def read_vocoder(self) -> nn.Module:
        from light_tts.models.vocoder.hift import Hift

        return Hift.from_checkpoint(self._model_dir, self._config, "cpu")
