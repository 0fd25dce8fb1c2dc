"""The speech language model for a GPU: the weights of `SpeechLM` with as few and as large kernels per layer
as possible, over the KV pool."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.common.kv_pool import KVPool, LayerPool
from light_tts.kernels import configs
from light_tts.kernels.llm.activation import silu_mul
from light_tts.kernels.llm.norm import add_rms_norm_, rms_norm
from light_tts.kernels.llm.small_linear import linear_add_, norm_gate_up_silu, rms_norm_linear
from light_tts.models.llm.fused_layer import fuse, fuse_head
from light_tts.models.llm.packed_layers import PackedLayers, packed_layers
from light_tts.models.llm.speech_lm import SpeechLM, rotary_table

Attend = Callable[[Tensor, LayerPool], Tensor]
"""(qkv: (tokens, (heads + 2 * kv_heads) * head_dim), the layer's pool) -> (tokens, heads, head_dim). Rotates
q and k, writes k and v to the pool and attends."""
_FEW = 32  # tokens, used if the crossover to separate kernels has not been measured


class FusedLM:
    """`max_len`: upper bound of positions; `few`: up to this many tokens each linear is fused with the
    surrounding operations into one kernel, because the time is dominated by reading the weights. The model
    remains usable: its linears become views of the joined weights, so that these take no extra memory, and
    its norms' weights become one."""

    def __init__(self, model: SpeechLM, pool: KVPool, max_len: int, few: int | None = None) -> None:
        backbone = model.backbone
        self.embedding = model.embedding.weight
        device = self.embedding.device
        self._layers = [fuse(layer) for layer in model.llm.model.model.layers]
        self._head, self._head_bias = fuse_head(model.llm.model.model.norm, model.llm_decoder)
        self._speech_vocab = model.ids.speech_vocab
        self._few = configs.load(device).get("fused_rows", _FEW) if few is None else few
        self._eps = backbone.rms_norm_eps
        self._packed = packed_layers(self._layers, self._head, self._head_bias, self._eps)
        self._pool = pool.layers()
        positions = torch.arange(max_len, device=device)
        cos, sin = rotary_table(positions, backbone.head_dim, backbone.rope_theta, torch.float32)
        self.rope = cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def __call__(self, residual: Tensor, attend: Attend, last: Tensor | None = None) -> Tensor:
        """residual: (tokens, hidden) embeddings, overwritten; last: (n,) indices of the tokens whose logits
        are needed, None: all -> (n, speech ids) in the weights' dtype, not contiguous if the head's outputs
        are padded"""
        return self._head_outputs(residual, attend, last)[:, : self._speech_vocab]

    def _head_outputs(self, residual: Tensor, attend: Attend, last: Tensor | None) -> Tensor:
        if self._packed is not None and len(residual) in self._packed.rows:
            return self._few_packed(self._packed, residual, attend, last)
        layers = zip(self._layers, self._pool, strict=True)
        if len(residual) <= self._few:
            for layer, pool in layers:
                qkv = rms_norm_linear(residual, self._eps, layer.qkv, layer.qkv_bias)
                linear_add_(residual, attend(qkv, pool).flatten(1), layer.out)
                gated = norm_gate_up_silu(residual, self._eps, layer.gate_up)
                linear_add_(residual, gated, layer.down)
            if last is not None:
                residual = residual.index_select(0, last)
            return rms_norm_linear(residual, self._eps, self._head, self._head_bias)

        x = rms_norm(residual, self._eps)
        for layer, pool in layers:
            attended = attend(F.linear(x, layer.qkv, layer.qkv_bias), pool).flatten(1)
            x = add_rms_norm_(residual, F.linear(attended, layer.out), self._eps)
            gated = silu_mul(F.linear(x, layer.gate_up))
            x = add_rms_norm_(residual, F.linear(gated, layer.down), self._eps)
        return F.linear(x if last is None else x.index_select(0, last), self._head, self._head_bias)

    def _few_packed(
        self, packed: PackedLayers, residual: Tensor, attend: Attend, last: Tensor | None
    ) -> Tensor:
        for layer, pool in zip(packed.layers, self._pool, strict=True):
            attended = attend(layer.qkv(residual), pool).flatten(1)
            layer.out(attended, residual)
            layer.down(layer.gate_up(residual), residual)
        return packed.head(residual if last is None else residual.index_select(0, last))
