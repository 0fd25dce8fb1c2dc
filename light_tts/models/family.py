"""Family: the stages' interface to a checkpoint. Only this module knows which models exist: to add one, write
another class with the members of `Family` and add a line to `load_family`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from light_tts.models.checkpoint.cosyvoice3_config import is_cosyvoice3
from light_tts.models.cosyvoice2 import CosyVoice2
from light_tts.models.cosyvoice3 import CosyVoice3
from light_tts.models.flow_options import FlowOptions
from light_tts.models.numbers import ModelNumbers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from light_tts.models.flow.base import BaseFlow
    from light_tts.models.flow.interface import FlowBackend
    from light_tts.models.frontend.frontend import Frontend
    from light_tts.models.frontend.spellers import Spell
    from light_tts.models.llm.interface import Aligner
    from light_tts.models.llm.speech_lm import SpeechLM
    from light_tts.models.vocoder.interface import CausalVocoder, Vocoder


class Family(Protocol):
    """The parameters of a checkpoint and the loaders of its components. Loaders raise CheckpointError."""

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> Sequence[str]:
        """Names in the checkpoint's directory of what it must have besides the weights of the LLM."""

    @property
    def numbers(self) -> ModelNumbers: ...

    def load_frontend(self, spellers: dict[str, Spell], at_once: int) -> Frontend: ...

    def load_llm(self, weights: Path, device: torch.device, dtype: torch.dtype) -> SpeechLM:
        """`weights`: the LLM file of one style."""

    def load_aligner(self, model: SpeechLM) -> Aligner | None:
        """Return the aligner, or None if the checkpoint does not support word times."""

    def load_flow(
        self,
        device: torch.device,
        dtype: torch.dtype,
        options: FlowOptions,
        ended: Callable[[str], None] = ...,
    ) -> Callable[[], FlowBackend]:
        """See `choose_flow`."""

    def load_vocoder(self, device: torch.device, cached_frames: int) -> Callable[[], Vocoder | CausalVocoder]:
        """See `choose_vocoder`. `cached_frames`: maximum number of mel frames of a cached source, which a
        causal vocoder does not have."""

    def read_flow(self) -> BaseFlow:
        """Return the flow in plain PyTorch on the CPU, to look at its weights."""

    def read_vocoder(self) -> nn.Module:
        """The same for the vocoder."""


def load_family(model_dir: str | Path) -> Family:
    """Return the family of the checkpoint in this directory. Raises ConfigError naming the file and the
    key."""
    return family_type(model_dir)(Path(model_dir))


def family_type(model_dir: str | Path) -> type[CosyVoice2] | type[CosyVoice3]:
    """Return the class of the checkpoint's family, which its YAML file tells."""
    return CosyVoice3 if is_cosyvoice3(Path(model_dir)) else CosyVoice2
