"""Family: the interface of a checkpoint for the stages. Which model it holds is decided here and nowhere
else: another model is another class with the members of `Family`, and a line in `load_family`."""

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
    """The numbers of a checkpoint, and the loading of its parts. What loads raises CheckpointError."""

    @property
    def sample_rate(self) -> int:
        """Output sample rate in Hz."""

    @property
    def samples_per_token(self) -> int:
        """Output samples for each speech token."""

    @property
    def frames_per_token(self) -> int:
        """Mel frames for each speech token."""

    @property
    def samples_per_frame(self) -> int:
        """Output samples for each mel frame."""

    @property
    def chunk_tokens(self) -> int:
        """Speech tokens of one streaming chunk."""

    @property
    def lookahead_tokens(self) -> int:
        """Speech tokens after a chunk that the flow has to see."""

    @property
    def spoken_ids(self) -> int:
        """Number of speech ids that the flow can speak; ids from here on are special."""

    @property
    def max_speech_tokens(self) -> int:
        """Most speech tokens that the flow takes at once, those of the prompt included."""

    @property
    def sampling(self) -> SamplingRule:
        """How tokens are drawn unless the request says otherwise."""

    @property
    def mix_ratio(self) -> tuple[int, int]:
        """Text ids and speech tokens of a block while text arrives bit by bit."""

    def load_frontend(self, spellers: dict[str, Spell], at_once: int) -> Frontend: ...

    def load_llm(self, weights: Path, device: torch.device, dtype: torch.dtype) -> SpeechLM:
        """`weights`: the file of one style."""

    def load_aligner(self, model: SpeechLM) -> Aligner | None:
        """None: the checkpoint does not say how it is known when its words are spoken."""

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
        """See `choose_flow`. `n_timesteps`: Euler steps in place of the checkpoint's."""

    def load_vocoder(self, device: torch.device, cached_frames: int) -> Callable[[], Vocoder]:
        """See `choose_vocoder`. `cached_frames`: mel frames that a source begins with at most."""


def load_family(model_dir: str | Path) -> Family:
    """The family of the checkpoint in this directory. Raises ConfigError naming the file and the key."""
    return CosyVoice2(Path(model_dir))
