"""The encoder of the flow with a diffusion transformer on a GPU, from ids to features, in four kernels: the
embedding, the look-ahead layer, and a repetition for each frame of a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.kernels.flow.repeat_rows import repeat_rows
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.encoder_table import EncoderParts, TableEncoder
from light_tts.models.flow.packed_lookahead import PackedLookahead


class PackedDiTEncoder(TableEncoder):
    """`dtype`: type of weights and activations; sums are float32. Thread-safe."""

    @torch.inference_mode()
    def __init__(self, flow: DiTFlow, dtype: torch.dtype) -> None:
        super().__init__(flow)
        self._embedded = F.pad(flow.input_embedding.weight, (0, 0, 0, 1)).to(dtype)  # zeros for no id
        self._lookahead = PackedLookahead(flow.pre_lookahead_layer, dtype)

    def shortened(self) -> PackedDiTEncoder:
        return self

    def __call__(self, parts: EncoderParts, out: Tensor) -> None:
        x = self._embedded.index_select(0, parts.ids)
        x = self._lookahead(x, parts.tokens, len(parts.ids) // len(parts.items))
        repeat_rows(x, parts.target, out)
