"""BaseFlow, the base class of the flows: converts speech tokens and a prompt to a mel spectrogram."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.checkpoint.config import CommonFlowConfig
from light_tts.models.flow.cfm import ConditionalFlowMatching
from light_tts.models.flow.chunk_estimator import ChunkEstimator


class TokenMemory(Protocol):
    """State after `tokens` tokens of one item, for the encoder output of later ones."""

    @property
    def tokens(self) -> int: ...


class BaseFlow(nn.Module, ABC):
    """`ratio`: mel frames per token; `lookahead`: number of following tokens that a token's frames depend on.
    Subclasses set `decoder`, and encode tokens."""

    decoder: ConditionalFlowMatching[Any]

    def __init__(self, config: CommonFlowConfig) -> None:
        super().__init__()
        self.ratio = config.token_mel_ratio
        self.lookahead = config.pre_lookahead_len
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, config.output_size)

    @property
    @abstractmethod
    def chunk_size(self) -> int:
        """Tokens of an attention chunk in streaming mode."""

    @abstractmethod
    def condition(
        self, ids: Tensor, lengths: Tensor, streaming: bool, finalize: bool | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the encoder output for the estimator, (B, frames, 80), and its lengths (B,). ids: (B, T)
        int64, lengths: (B,); the rest as in `inference`."""

    @abstractmethod
    def memory(self) -> TokenMemory:
        """Return the memory at the start of a sequence."""

    @abstractmethod
    def extend(self, ids: Tensor, tokens: int, memory: Any) -> tuple[Tensor, TokenMemory]:
        """Return the encoder output of the next `tokens` tokens of one item, (ratio * tokens, 80), as
        `condition` computes the last chunk, and the updated memory. ids: (T,), these tokens and up to
        `lookahead` more."""

    @abstractmethod
    def chunk_estimator(self) -> ChunkEstimator:
        """Return the estimator and its integration for single sequences on a CPU in float32."""

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
        mu, lengths = self.condition(ids, prompt_len + token_len, streaming, finalize)
        mu = mu.transpose(1, 2)
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
