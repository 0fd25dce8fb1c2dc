"""The speech language model for a GPU: the weights of `SpeechLM` with as few and as large kernels a layer as
possible, over the KV pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.common.kv_pool import KVPool
from light_tts.kernels import configs, prefetch
from light_tts.kernels.activation import silu_mul
from light_tts.kernels.norm import add_rms_norm_, rms_norm
from light_tts.kernels.prefetch import Ahead
from light_tts.kernels.small_linear import fold_norm, linear_add_, norm_gate_up_silu, norm_linear
from light_tts.models.cosyvoice2.llm import Layer, SpeechLM, rotary_table

LayerPool = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Attend = Callable[[Tensor, LayerPool, Ahead | None], Tensor]
"""(qkv: (tokens, (heads + 2 * kv_heads) * head_dim), the layer's pool, weights to fetch meanwhile) ->
(tokens, heads, head_dim). Rotates q and k, writes k and v into the pool and attends."""
_FEW = 32  # tokens, where it was not measured up to how many fused linears are faster


@dataclass(frozen=True)
class FusedLayer:
    """`qkv`, `gate_up`: the weights of linears with the same input, one below the other, each with the weight
    of the norm in front of it."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class PrefetchPlan:
    """How far kernels fetch weights ahead of their use. `distance`: bytes, at the beginning of a layer; the
    layer's bytes are asked for in `shares`, by its five kernels: qkv, attention, out, gate_up, down."""

    distance: int = 12_000_000
    shares: tuple[float, ...] = (0.15, 0.3, 0.15, 0.25, 0.15)


class FusedLM:
    """`max_len`: positions are below it; `few`: up to so many tokens each linear is one kernel with what is
    around it, since then reading the weights is all that takes time. The model stays what it is, but its own
    linears become views of the joined weights, so that these take no more memory, and its norms' weights
    one."""

    def __init__(
        self,
        model: SpeechLM,
        pool: KVPool,
        max_len: int,
        few: int | None = None,
        plan: PrefetchPlan | None = None,
    ) -> None:
        backbone = model.backbone
        self.embedding = model.embedding.weight
        device = self.embedding.device
        layers = model.llm.model.model.layers
        joins = [join for layer in layers for join in _joins(layer)]
        joins.append(([model.llm_decoder], model.llm.model.model.norm))
        sizes = [sum(linear.weight.numel() for linear in linears) for linears, _ in joins]
        # in the order of their use, so that what is wanted next is what lies next
        weights = self.embedding.new_empty(sum(sizes))
        joined = iter([_join(*join, room) for join, room in zip(joins, weights.split(sizes), strict=True)])
        self._layers = [FusedLayer(*next(joined), *(next(joined)[0] for _ in range(3))) for _ in layers]
        self._head, self._head_bias = next(joined)
        self._ahead = _ahead(weights, sum(sizes[:-1]) // len(layers), len(layers), plan or PrefetchPlan())
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
            ahead = iter(self._ahead)
            for layer, pool in layers:
                qkv = norm_linear(residual, self._eps, layer.qkv, layer.qkv_bias, next(ahead))
                attended = attend(qkv, pool, next(ahead)).flatten(1)
                linear_add_(residual, attended, layer.out, next(ahead))
                gated = norm_gate_up_silu(residual, self._eps, layer.gate_up, next(ahead))
                linear_add_(residual, gated, layer.down, next(ahead))
            if last is not None:
                residual = residual.index_select(0, last)
            return norm_linear(residual, self._eps, self._head, self._head_bias, next(ahead))

        x = rms_norm(residual, self._eps)
        for layer, pool in layers:
            attended = attend(F.linear(x, layer.qkv, layer.qkv_bias), pool, None).flatten(1)
            x = add_rms_norm_(residual, F.linear(attended, layer.out), self._eps)
            gated = silu_mul(F.linear(x, layer.gate_up))
            x = add_rms_norm_(residual, F.linear(gated, layer.down), self._eps)
        return F.linear(x if last is None else x.index_select(0, last), self._head, self._head_bias)


def _joins(layer: Layer) -> list[tuple[list[nn.Linear], nn.Module | None]]:
    """The linears of a layer whose input is the same, with the norm in front of them, in the order of
    FusedLayer."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        ([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm),
        ([attention.o_proj], None),
        ([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm),
        ([mlp.down_proj], None),
    ]


def _join(linears: list[nn.Linear], norm: nn.Module | None, room: Tensor) -> tuple[Tensor, Tensor | None]:
    """-> weight, in `room`, and bias of one linear that does what all do together with the norm in front of
    them; theirs become views of it"""
    weight = room.view(-1, linears[0].in_features)
    torch.cat([linear.weight.data for linear in linears], out=weight)
    if norm is not None:
        weight.copy_(fold_norm(weight, norm.weight.data))
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


def _ahead(weights: Tensor, layer: int, layers: int, plan: PrefetchPlan) -> list[Ahead | None]:
    """What each kernel of a step asks for; the last one, of the head, for what the next step begins with.
    layer: numbers in the weights of one."""
    element = weights.element_size()
    ends = [
        plan.distance / element + layer * (index + share)
        for index in range(layers)
        for share in accumulate(plan.shares)
    ]
    line = prefetch.LINE // element
    edges = [min(int(end) // line * line, len(weights)) for end in [plan.distance / element, *ends]]
    wanted = [*pairwise(edges), (0, edges[0])]
    if not prefetch.supported(weights.device):
        return [None for _ in wanted]
    return [Ahead(weights[start:end]) if end > start else None for start, end in wanted]
