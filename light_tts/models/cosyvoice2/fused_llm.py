"""The speech language model for a GPU: the weights of `SpeechLM` with as few and as large kernels a layer as
possible, over the KV pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.common.kv_pool import KVPool
from light_tts.kernels.activation import silu_mul
from light_tts.kernels.norm import add_rms_norm_, rms_norm
from light_tts.kernels.rotary import rotary_kv_write
from light_tts.kernels.small_linear import MAX_ROWS, linear_add_, norm_gate_up_silu, norm_linear
from light_tts.models.cosyvoice2.llm import Layer, SpeechLM, rotary_table

LayerPool = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Attend = Callable[[Tensor, LayerPool], Tensor]
"""(q: (tokens, heads, head_dim), the layer's pool, where k and v lie already) -> like q"""


@dataclass(frozen=True)
class FusedLayer:
    """`qkv`, `gate_up`: the weights of linears with the same input, one below the other."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FusedLM:
    """`max_len`: positions are below it; `few`: up to so many tokens each linear is one kernel with what is
    around it, since then reading the weights is all that takes time. The model's own linears become views of
    the joined weights, so that these take no more memory."""

    def __init__(self, model: SpeechLM, pool: KVPool, max_len: int, few: int = MAX_ROWS) -> None:
        backbone = model.backbone
        self._embedding = model.embedding.weight
        self._layers = [_fuse(layer) for layer in model.llm.model.model.layers]
        self._final_norm = model.llm.model.model.norm.weight
        self._head, self._head_bias = model.llm_decoder.weight, model.llm_decoder.bias
        self._few = few
        self._eps = backbone.rms_norm_eps
        self._pool = pool.layers()
        positions = torch.arange(max_len, device=self._embedding.device)
        cos, sin = rotary_table(positions, backbone.head_dim, backbone.rope_theta, torch.float32)
        self._cos, self._sin = cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def __call__(
        self, input_ids: Tensor, positions: Tensor, slots: Tensor, attend: Attend, last: Tensor | None = None
    ) -> Tensor:
        """input_ids, positions, slots: (tokens,) int32, a negative slot for a token that only fills up the
        batch; last: (n,) the tokens whose logits are wanted, None: all -> (n, speech ids) of the weights'
        dtype"""
        residual = F.embedding(input_ids, self._embedding)
        layers = zip(self._layers, self._pool, strict=True)

        def attended(qkv: Tensor, pool: LayerPool) -> Tensor:
            q = rotary_kv_write(qkv, self._cos, self._sin, positions, slots, *pool)
            return attend(q, pool).flatten(1)

        if len(input_ids) <= self._few:
            for layer, pool in layers:
                qkv = norm_linear(residual, layer.input_norm, self._eps, layer.qkv, layer.qkv_bias)
                linear_add_(residual, attended(qkv, pool), layer.out)
                gated = norm_gate_up_silu(residual, layer.post_norm, self._eps, layer.gate_up)
                linear_add_(residual, gated, layer.down)
            if last is not None:
                residual = residual.index_select(0, last)
            return norm_linear(residual, self._final_norm, self._eps, self._head, self._head_bias)

        x = rms_norm(residual, self._layers[0].input_norm, self._eps)
        next_norms = [layer.input_norm for layer in self._layers[1:]] + [self._final_norm]
        for (layer, pool), next_norm in zip(layers, next_norms, strict=True):
            out = F.linear(attended(F.linear(x, layer.qkv, layer.qkv_bias), pool), layer.out)
            x = add_rms_norm_(residual, out, layer.post_norm, self._eps)
            down = F.linear(silu_mul(F.linear(x, layer.gate_up)), layer.down)
            x = add_rms_norm_(residual, down, next_norm, self._eps)
        return F.linear(x if last is None else x.index_select(0, last), self._head, self._head_bias)


def _fuse(layer: Layer) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _join(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, _ = _join(mlp.gate_proj, mlp.up_proj)
    return FusedLayer(
        layer.input_layernorm.weight,
        qkv,
        qkv_bias,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        gate_up,
        mlp.down_proj.weight,
    )


def _join(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """-> weight and bias of one linear that does what all do, of which theirs become views"""
    joined = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = torch.cat([part.data for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
        joined.append(whole)
    return joined[0], joined[1]
