"""The CosyVoice3 family: its components, and its parameters from `cosyvoice3.yaml`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from light_tts.models.checkpoint.cosyvoice3_config import YAML_NAME, load_config3
from light_tts.models.cosyvoice import CosyVoice
from light_tts.models.flow_options import FlowOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from light_tts.models.flow.base import BaseFlow
    from light_tts.models.flow.interface import FlowBackend
    from light_tts.models.vocoder.interface import CausalVocoder


class CosyVoice3(CosyVoice):
    """Implements `Family`."""

    name = "CosyVoice3"
    files = (
        YAML_NAME,
        "flow.pt",
        "hift.pt",
        "campplus.onnx",
        "speech_tokenizer_v3.onnx",
        "CosyVoice-BlankEN",
    )

    def __init__(self, model_dir: Path) -> None:
        """Raises ConfigError naming the file and the key."""
        self._config = config = load_config3(model_dir)
        super().__init__(model_dir, config, config.flow.pre_lookahead_len, config.flow.vocab_size)

    def load_flow(
        self,
        device: torch.device,
        dtype: torch.dtype,
        options: FlowOptions,
        ended: Callable[[str], None] = lambda phase: None,
    ) -> Callable[[], FlowBackend]:
        from light_tts.models.flow.dit.backend import choose_dit_flow

        ended("imports")
        return choose_dit_flow(self._model_dir, self._config, device, dtype, options, ended)

    def load_vocoder(self, device: torch.device, cached_frames: int) -> Callable[[], CausalVocoder]:
        from light_tts.models.vocoder.backend import choose_causal_vocoder
        from light_tts.models.vocoder.causal_hift import CausalHift

        return choose_causal_vocoder(CausalHift.from_checkpoint(self._model_dir, self._config, device))

    def read_flow(self) -> BaseFlow:
        import torch

        from light_tts.models.flow.dit.flow import DiTFlow

        return DiTFlow.from_checkpoint(self._model_dir, self._config, torch.device("cpu"))

    def read_vocoder(self) -> nn.Module:
        from light_tts.models.vocoder.causal_hift import CausalHift

        return CausalHift.from_checkpoint(self._model_dir, self._config, "cpu")
