"""Who computes the flow: packed batches on a GPU; on a CPU one item at a time, streams with a memory; padded
batches in plain PyTorch, the reference of both, which run everywhere."""

from __future__ import annotations

import importlib.util
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from light_tts.models.checkpoint.config import Config
from light_tts.models.flow.estimator_backend import TorchEstimator, choose_estimator
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.memos import Memo, MemoLimit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowItem:
    """prompt: (p,) int ids on the host; prompt_mel: (ratio * p or more, mels) and embedding: (size,) on the
    device; tokens: ids to speak. streaming: attention in chunks; finalize: False: the last `lookahead` tokens
    are only context. The memos of voice and stream: for a backend that keeps something of them; a stream's
    next item has the same ones, and its tokens begin with these."""

    prompt: np.ndarray
    prompt_mel: Tensor
    embedding: Tensor
    tokens: Sequence[int]
    streaming: bool
    finalize: bool
    voice_memo: Memo = field(default_factory=Memo)
    stream_memo: Memo = field(default_factory=Memo)


class FlowBackend(Protocol):
    """`packed`: a batch costs what its items cost, whatever their lengths and attention."""

    packed: bool

    def __call__(self, items: Sequence[FlowItem]) -> list[Tensor]:
        """The mel spectrogram of each item's tokens: (frames, mels) float32. Raises ValueError."""

    def warm_up(self, items: int) -> None:
        """Do what a first batch of up to `items` would have to wait for."""


class PaddedFlow:
    """Items whose attention agrees share a padded batch."""

    packed = False

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._device = flow.spk_embed_affine_layer.weight.device

    def warm_up(self, items: int) -> None:
        """Nothing is waited for."""

    def __call__(self, items: Sequence[FlowItem]) -> list[Tensor]:
        groups: dict[bool, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            groups[item.streaming].append(index)
        found: dict[int, Tensor] = {}
        for streaming, indices in groups.items():
            group = [items[index] for index in indices]
            tokens = [torch.tensor(item.tokens) for item in group]
            prompts = [torch.from_numpy(item.prompt).long() for item in group]
            mel, lengths = self._flow.inference(
                token=self._padded(tokens),
                token_len=self._lengths(tokens),
                prompt_token=self._padded(prompts),
                prompt_len=self._lengths(prompts),
                prompt_feat=pad_sequence([item.prompt_mel for item in group], batch_first=True),
                embedding=torch.stack([item.embedding for item in group]),
                streaming=streaming,
                finalize=torch.tensor([item.finalize for item in group], device=self._device),
            )
            for row, (index, length) in enumerate(zip(indices, lengths.tolist(), strict=True)):
                found[index] = mel[row, :, :length].T
        return [found[index] for index in range(len(items))]

    def _padded(self, rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True).to(self._device)

    def _lengths(self, rows: list[Tensor]) -> Tensor:
        return torch.tensor([len(row) for row in rows], device=self._device)


def choose_flow(
    model_dir: Path,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    load_trt: bool,
    max_batch_size: int,
    memory: int,
) -> Callable[[], FlowBackend]:
    """Loads the flow of a checkpoint. -> makes a backend for each CUDA stream that computes; they share their
    weights. `load_trt`: the estimator as a TensorRT engine, where that is possible; `memory`: bytes that may
    be kept of voices and streams on a CPU. Raises CheckpointError."""
    flow = Flow.from_checkpoint(model_dir, config, device)
    estimator = choose_estimator(flow.decoder.estimator, load_trt, device, model_dir, max_batch_size)
    if device.type == "cuda" and isinstance(estimator, TorchEstimator):
        if importlib.util.find_spec("triton") is not None:
            from light_tts.models.flow.packed import PackedFlow, pack

            packed = pack(flow, dtype)
            del flow.decoder.estimator
            flow.to(dtype)
            return lambda: PackedFlow(flow, packed, max_batch_size)
        log.warning("the package triton is not installed: the flow runs in plain PyTorch, slowly")
    if device.type == "cpu":
        from light_tts.models.flow.chunked import chunk_flow

        limit = MemoLimit(memory)
        return lambda: chunk_flow(flow, limit)
    flow.to(dtype)
    flow.decoder.backend = estimator
    return lambda: PaddedFlow(flow)
