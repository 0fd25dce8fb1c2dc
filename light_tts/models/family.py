"""Family: the stages' interface to a checkpoint. Only this module knows which models exist: to add one, write
another class with the members of `Family` and add a line to `load_family`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from light_tts.common.sampling_rule import SamplingRule
from light_tts.models.cosyvoice2 import CosyVoice2

if TYPE_CHECKING:
    import torch

    from light_tts.models.flow.interface import FlowBackend
    from light_tts.models.frontend.frontend import Frontend
    from light_tts.models.frontend.spellers import Spell
    from light_tts.models.llm.interface import Aligner
    from light_tts.models.llm.speech_lm import SpeechLM
    from light_tts.models.vocoder.interface import Vocoder


class Family(Protocol):
    """The parameters of a checkpoint and the loaders of its components. Loaders raise CheckpointError."""

    @property
    def sample_rate(self) -> int:
        """Output sample rate in Hz."""

    @property
    def samples_per_token(self) -> int:
        """Output samples per speech token."""

    @property
    def frames_per_token(self) -> int:
        """Mel frames per speech token."""

    @property
    def samples_per_frame(self) -> int:
        """Output samples per mel frame."""

    @property
    def chunk_tokens(self) -> int:
        """Speech tokens per streaming chunk."""

    @property
    def lookahead_tokens(self) -> int:
        """Number of speech tokens after a chunk that the flow needs."""

    @property
    def spoken_ids(self) -> int:
        """Number of speech ids that the flow can speak; ids from here on are special."""

    @property
    def max_speech_tokens(self) -> int:
        """Maximum number of speech tokens the flow accepts at once, including the prompt's."""

    @property
    def sampling(self) -> SamplingRule:
        """Default sampling parameters."""

    @property
    def mix_ratio(self) -> tuple[int, int]:
        """Text ids and speech tokens per block in bistream mode."""

    def load_frontend(self, spellers: dict[str, Spell], at_once: int) -> Frontend: ...

    def load_llm(self, weights: Path, device: torch.device, dtype: torch.dtype) -> SpeechLM:
        """`weights`: the LLM file of one style."""

    def load_aligner(self, model: SpeechLM) -> Aligner | None:
        """Return the aligner, or None if the checkpoint does not support word times."""

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
        """See `choose_flow`. `n_timesteps`: Euler steps, overriding the checkpoint's."""

    def load_vocoder(self, device: torch.device, cached_frames: int) -> Callable[[], Vocoder]:
        """See `choose_vocoder`. `cached_frames`: maximum number of mel frames of a cached source."""


def load_family(model_dir: str | Path) -> Family:
    """Return the family of the checkpoint in this directory. Raises ConfigError naming the file and the
    key.
    """
    return CosyVoice2(Path(model_dir))
