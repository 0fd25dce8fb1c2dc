"""The speech language model for a GPU: the weights of `SpeechLM` with as few and as large kernels a layer as
possible, over the KV pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.common.kv_pool import KVPool
from light_tts.kernels import configs
from light_tts.kernels.llm.activation import silu_mul
from light_tts.kernels.llm.norm import add_rms_norm_, rms_norm
from light_tts.kernels.llm.small_linear import fold_rms_norm, linear_add_, norm_gate_up_silu, rms_norm_linear
from light_tts.models.llm.speech_lm import Layer, SpeechLM, rotary_table

LayerPool = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Attend = Callable[[Tensor, LayerPool], Tensor]
"""(qkv: (tokens, (heads + 2 * kv_heads) * head_dim), the layer's pool) -> (tokens, heads, head_dim). Rotates
q and k, writes k and v into the pool and attends."""
_FEW = 32  # tokens, where it was not measured up to how many fused linears are faster


@dataclass(frozen=True)
class FusedLayer:
    """`qkv`, `gate_up`: the weights of linears with the same input, one below the other, each with the weight
    of the norm in front of it."""

    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class FusedLM:
    """`max_len`: positions are below it; `few`: up to so many tokens each linear is one kernel with what is
    around it, since then reading the weights is all that takes time. The model stays what it is, but its own
    linears become views of the joined weights, so that these take no more memory, and its norms' weights
    one."""

    def __init__(self, model: SpeechLM, pool: KVPool, max_len: int, few: int | None = None) -> None:
        backbone = model.backbone
        self.embedding = model.embedding.weight
        device = self.embedding.device
        self._layers = [_fuse(layer) for layer in model.llm.model.model.layers]
        self._head, self._head_bias = _join(model.llm.model.model.norm, model.llm_decoder)
        self._few = configs.load(device).get("fused_rows", _FEW) if few is None else few
        self._eps = backbone.rms_norm_eps
        self._pool = pool.layers()
        positions = torch.arange(max_len, device=device)
        cos, sin = rotary_table(positions, backbone.head_dim, backbone.rope_theta, torch.float32)
        self.rope = cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def __call__(self, residual: Tensor, attend: Attend, last: Tensor | None = None) -> Tensor:
        """residual: (tokens, hidden) embeddings, overwritten; last: (n,) the tokens whose logits are wanted,
        None: all -> (n, speech ids) of the weights' dtype"""
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


def _fuse(layer: Layer) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _join(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, _ = _join(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    return FusedLayer(qkv, qkv_bias, attention.o_proj.weight, gate_up, mlp.down_proj.weight)


def _join(norm: nn.Module, *linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """-> weight and bias of one linear that does what all do together with the norm in front of them; theirs
    become views of it"""
    weight = fold_rms_norm(torch.cat([linear.weight.data for linear in linears]), norm.weight.data)
    norm.weight.data = torch.ones_like(norm.weight)
    sizes = [len(linear.weight) for linear in linears]
    for linear, view in zip(linears, weight.split(sizes), strict=True):
        linear.weight.data = view
    if linears[0].bias is None:
        return weight, None
    bias = torch.cat([linear.bias.data for linear in linears])
    for linear, view in zip(linears, bias.split(sizes), strict=True):
        linear.bias.data = view
    return weight, bias
