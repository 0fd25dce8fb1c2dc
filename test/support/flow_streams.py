"""Random voices, and streams of random tokens in them, as the flow is given them."""

from __future__ import annotations

import numpy as np
import torch

from light_tts.engine.speech.chunk_planner import ChunkPlanner
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.memos import Memo

HOP, LOOKAHEAD, RATIO = 25, 3, 2
ERROR = 2e-4  # of mel values up to about 10, in float32


class Voice:
    def __init__(self, flow: BaseFlow, seed: int, tokens: int) -> None:
        device = flow.input_embedding.weight.device
        random = np.random.default_rng(seed)
        self.prompt = random.integers(0, flow.input_embedding.num_embeddings, tokens).astype(np.int32)
        self.mel = torch.from_numpy(random.normal(size=(RATIO * tokens, 80))).float().to(device)
        size = flow.spk_embed_affine_layer.in_features
        self.embedding = torch.from_numpy(random.normal(size=size)).float().to(device)
        self.memo = Memo()


class Stream:
    """The same seed gives the same tokens."""

    def __init__(self, flow: BaseFlow, voice: Voice, seed: int, tokens: int) -> None:
        random = np.random.default_rng(seed)
        self.tokens = random.integers(0, flow.input_embedding.num_embeddings, tokens).tolist()
        self.voice, self.memo = voice, Memo()

    def chunks(self, growth: int = 1, last_sees_all: bool = False) -> list[FlowItem]:
        """`growth`: up to so many times the hop."""
        planner = ChunkPlanner(len(self.voice.prompt), HOP, LOOKAHEAD, growth * HOP)
        items = []
        while chunk := planner.next_chunk(len(self.tokens), finished=True):
            streaming = not (chunk.final and last_sees_all)
            items.append(self.item(chunk.context_end, streaming, chunk.final))
        return items

    def item(self, tokens: int, streaming: bool, finalize: bool) -> FlowItem:
        voice = self.voice
        return FlowItem(
            voice.prompt,
            voice.mel,
            voice.embedding,
            self.tokens[:tokens],
            streaming,
            finalize,
            voice.memo,
            self.memo,
        )


def assert_close(mel: torch.Tensor, expected: torch.Tensor) -> None:
    assert mel.shape == expected.shape
    assert (mel - expected).abs().max() < ERROR
