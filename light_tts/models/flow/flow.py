"""Speech tokens to mel spectrogram: embedding, encoder, conditional flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.checkpoint.config import Config, FlowConfig
from light_tts.models.checkpoint.weights import load_into, load_state_dict, on_meta, shape_of
from light_tts.models.flow.cfm import ConditionalFlowMatching
from light_tts.models.flow.encoder import UpsampleConformerEncoder


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


class Flow(nn.Module):
    def __init__(self, config: FlowConfig, shapes: FlowShapes) -> None:
        super().__init__()
        self.ratio = config.token_mel_ratio
        self.lookahead = config.pre_lookahead_len
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, config.output_size)
        self.encoder = UpsampleConformerEncoder(
            config.encoder,
            lookahead=config.pre_lookahead_len,
            ratio=config.token_mel_ratio,
            lookahead_channels=shapes.lookahead_channels,
            up_channels=shapes.up_channels,
            num_up_blocks=shapes.num_up_blocks,
        )
        self.encoder_proj = nn.Linear(config.encoder.output_size, config.output_size)
        self.decoder = ConditionalFlowMatching(config, shapes.time_embed_dim)

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

    @torch.inference_mode()
    def inference(
        self,
        token: Tensor,
        token_len: Tensor,
        prompt_token: Tensor,
        prompt_len: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        streaming: bool,
        finalize: bool | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the mel spectrogram of `token`, spoken in the voice of the prompt.

        token: (B, N) int64 padded, token_len: (B,); prompt_token: (B, P) int64 padded, prompt_len: (B,) may
        be zero; prompt_feat: (B, ratio * P, 80) its mel; embedding: (B, spk_embed_dim). streaming: attention
        in chunks. finalize: bool or (B,) bool, False: the last `lookahead` tokens are only context. Returns
        mel (B, 80, frames) float32, zero after the end, and its lengths (B,), `ratio` per spoken token.
        Raises ValueError if an item has nothing to speak or is too long.
        """
        if int((token_len - self.lookahead * ~torch.as_tensor(finalize)).min()) <= 0:
            raise ValueError(
                f"flow: {token_len.tolist()} tokens leave nothing to speak (finalize: {finalize})"
            )
        ids = _join(prompt_token, prompt_len, token, token_len)
        features, lengths = self.encode(ids, prompt_len + token_len, streaming, finalize)
        mu = self.encoder_proj(features).transpose(1, 2)
        cond = torch.zeros_like(mu)
        known = min(prompt_feat.shape[1], mu.shape[2])
        cond[:, :, :known] = prompt_feat[:, :known].transpose(1, 2)
        prompt_frames = self.ratio * prompt_len
        cond *= (torch.arange(mu.shape[2], device=mu.device) < prompt_frames[:, None])[:, None]
        mel = self.decoder(mu, lengths, self.speaker(embedding), cond, streaming).float()
        return _cut(mel, prompt_frames, lengths)

    def speaker(self, embedding: Tensor) -> Tensor:
        """(B, spk_embed_dim) -> (B, 80)"""
        normal = F.normalize(embedding.float(), dim=1).to(self.spk_embed_affine_layer.weight.dtype)
        return self.spk_embed_affine_layer(normal)

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


def _join(first: Tensor, first_len: Tensor, second: Tensor, second_len: Tensor) -> Tensor:
    """Concatenate two padded (B, .) batches item by item; returns (B, longest) int64, zero after the end."""
    lengths = list(zip(first_len.tolist(), second_len.tolist(), strict=True))
    joined = first.new_zeros(len(lengths), max(n + m for n, m in lengths))
    for row, (n, m) in enumerate(lengths):
        joined[row, :n] = first[row, :n]
        joined[row, n : n + m] = second[row, :m]
    return joined


def _cut(mel: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """mel: (B, 80, T) -> the frames [start, end) of each item, moved to the front, and their number."""
    lengths = end - start
    cut = mel.new_zeros(*mel.shape[:2], int(lengths.max()))
    for row, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        cut[row, :, : last - first] = mel[row, :, first:last]
    return cut, lengths
