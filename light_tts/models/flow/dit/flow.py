"""Speech tokens to mel spectrogram: embedding, look-ahead layer, conditional flow matching with a diffusion
transformer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from light_tts.models.checkpoint.cosyvoice3_config import Config3, DiTFlowConfig
from light_tts.models.checkpoint.weights import load_into, load_state_dict, on_meta
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.cfm import ConditionalFlowMatching
from light_tts.models.flow.dit.chunked import DiTChunkEstimator
from light_tts.models.flow.dit.estimator import DiT
from light_tts.models.flow.lookahead import PreLookaheadLayer


@dataclass(frozen=True)
class LookaheadMemory:
    """State after `tokens` tokens of one item, for the encoder output of later ones. ahead: (1, channels, 2),
    the last inputs of the look-ahead layer's second convolution."""

    tokens: int
    ahead: Tensor


class DiTFlow(BaseFlow):
    def __init__(self, config: DiTFlowConfig) -> None:
        super().__init__(config)
        self.pre_lookahead_layer = PreLookaheadLayer(
            config.input_size, config.lookahead_channels, config.pre_lookahead_len
        )
        estimator = DiT(config.estimator, config.output_size)
        self.decoder = ConditionalFlowMatching(config, estimator, config.estimator.static_chunk_size)

    @classmethod
    def from_checkpoint(
        cls, model_dir: Path, config: Config3, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> DiTFlow:
        """Read `<model_dir>/flow.pt`. Raises CheckpointError."""
        path = Path(model_dir) / "flow.pt"
        state = load_state_dict(path)
        with on_meta():
            flow = cls(config.flow)
        load_into(flow, state, path, device=device)
        return flow.to(device, dtype).eval().requires_grad_(False)

    @property
    def chunk_size(self) -> int:
        return self.decoder.chunk_size // self.ratio

    def condition(
        self, ids: Tensor, lengths: Tensor, streaming: bool, finalize: bool | Tensor
    ) -> tuple[Tensor, Tensor]:
        embedded = self.input_embedding(ids.clamp(min=0))
        x, lengths = self.pre_lookahead_layer.of_batch(embedded, lengths, finalize)
        return x.repeat_interleave(self.ratio, dim=1), lengths * self.ratio

    def memory(self) -> LookaheadMemory:
        return LookaheadMemory(0, self.pre_lookahead_layer.before(1))

    def extend(self, ids: Tensor, tokens: int, memory: LookaheadMemory) -> tuple[Tensor, LookaheadMemory]:
        embedded = self.input_embedding(ids[None])
        x, ahead = self.pre_lookahead_layer.extend(embedded, tokens, memory.ahead)
        return x[0].repeat_interleave(self.ratio, dim=0), LookaheadMemory(memory.tokens + tokens, ahead)

    def chunk_estimator(self) -> DiTChunkEstimator:
        return DiTChunkEstimator(self.decoder.estimator, self.decoder.steps, self.decoder.guidance)
