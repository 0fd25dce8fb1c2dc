"""Speech tokens to mel spectrogram: embedding, encoder, conditional flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from light_tts.models.checkpoint.cosyvoice2_config import Config, FlowConfig
from light_tts.models.checkpoint.weights import load_into, load_state_dict, on_meta, shape_of
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.cfm import ConditionalFlowMatching
from light_tts.models.flow.encoder import EncoderMemory, UpsampleConformerEncoder
from light_tts.models.flow.unet.chunked import UnetChunkEstimator
from light_tts.models.flow.unet.estimator import Estimator


@dataclass(frozen=True)
class FlowShapes:
    """Sizes that are determined by the checkpoint's tensors only."""

    num_up_blocks: int
    lookahead_channels: int
    up_channels: int
    time_embed_dim: int

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], path: Path) -> FlowShapes:
        """Raises CheckpointError naming `path` and the tensor."""
        up_blocks = {name.split(".")[2] for name in state if name.startswith("encoder.up_encoders.")}
        return cls(
            num_up_blocks=len(up_blocks),
            lookahead_channels=shape_of(state, "encoder.pre_lookahead_layer.conv1.weight", 3, path)[0],
            up_channels=shape_of(state, "encoder.up_layer.conv.weight", 3, path)[0],
            time_embed_dim=shape_of(state, "decoder.estimator.time_mlp.linear_1.weight", 2, path)[0],
        )


class Flow(BaseFlow):
    def __init__(self, config: FlowConfig, shapes: FlowShapes) -> None:
        super().__init__(config)
        self.encoder = UpsampleConformerEncoder(
            config.encoder,
            lookahead=config.pre_lookahead_len,
            ratio=config.token_mel_ratio,
            lookahead_channels=shapes.lookahead_channels,
            up_channels=shapes.up_channels,
            num_up_blocks=shapes.num_up_blocks,
        )
        self.encoder_proj = nn.Linear(config.encoder.output_size, config.output_size)
        estimator = Estimator(config.estimator, shapes.time_embed_dim)
        self.decoder = ConditionalFlowMatching(config, estimator, config.estimator.static_chunk_size)

    @classmethod
    def from_checkpoint(
        cls, model_dir: Path, config: Config, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Flow:
        """Read `<model_dir>/flow.pt`. Raises CheckpointError."""
        path = Path(model_dir) / "flow.pt"
        state = load_state_dict(path)
        with on_meta():
            flow = cls(config.flow, FlowShapes.from_state(state, path))
        load_into(flow, state, path, device=device)
        return flow.to(device, dtype).eval().requires_grad_(False)

    @property
    def chunk_size(self) -> int:
        return self.encoder.chunk_size

    def condition(
        self, ids: Tensor, lengths: Tensor, streaming: bool, finalize: bool | Tensor
    ) -> tuple[Tensor, Tensor]:
        features, lengths = self.encode(ids, lengths, streaming, finalize)
        return self.encoder_proj(features), lengths

    def memory(self) -> EncoderMemory:
        return self.encoder.memory()

    def extend(self, ids: Tensor, tokens: int, memory: EncoderMemory) -> tuple[Tensor, EncoderMemory]:
        features, memory = self.encoder.extend(self.input_embedding(ids[None]), tokens, memory)
        return self.encoder_proj(features[0]), memory

    def chunk_estimator(self) -> UnetChunkEstimator:
        return UnetChunkEstimator(self.decoder.estimator, self.decoder.steps, self.decoder.guidance)

    def encode(
        self,
        ids: Tensor,
        lengths: Tensor,
        streaming: bool | Tensor,
        finalize: bool | Tensor,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """ids: (B, T) int64 -> features (B, frames, width) and their lengths (B,). Other arguments as in the
        encoder."""
        return self.encoder(self.input_embedding(ids.clamp(min=0)), lengths, streaming, finalize, longest)
