"""The flow over padded batches in plain PyTorch. It runs on every device and is the reference for the
others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from light_tts.common.cuda_graphs import GraphCache
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.memos import Memo


class PaddedFlow:
    """Items with the same attention mode share a padded batch."""

    packed = False
    graphs: GraphCache | None = None

    def __init__(self, flow: BaseFlow) -> None:
        self._flow = flow
        self._device = flow.spk_embed_affine_layer.weight.device

    def cached_frames(self, voice: Memo, stream: Memo) -> int:
        return 0

    def warm_up(self, items: int, first: bool = True) -> None:
        """Nothing to prepare."""

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
