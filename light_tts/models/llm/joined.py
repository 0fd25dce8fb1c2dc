"""The speech language model for a CPU, where the time of a step is that of reading the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.llm.speech_lm import AttentionContext, Layer, SpeechLM, rotary_table, rotate, swiglu


class JoinedLM:
    """`SpeechLM` with linears of the same input joined, and with their weights stored by input rows, which is
    the fastest layout for the product with a single row. The model's own linears become views of these, so
    that they take no extra memory."""

    def __init__(self, model: SpeechLM) -> None:
        self.ids = model.ids
        self.embedding = model.embedding
        self.logits = model.logits
        self._backbone = model.backbone
        self._norm = model.llm.model.model.norm
        self._layers = [_join(layer) for layer in model.llm.model.model.layers]

    def __call__(self, input_ids: Tensor, positions: Tensor, attention: AttentionContext) -> Tensor:
        """As `SpeechLM.forward`."""
        x = self.embedding(input_ids)
        backbone = self._backbone
        rotary = rotary_table(positions, backbone.head_dim, backbone.rope_theta, x.dtype)
        turned = backbone.num_attention_heads + backbone.num_key_value_heads
        parts = backbone.num_attention_heads, backbone.num_key_value_heads
        width, eps = x.shape[1:], backbone.rms_norm_eps
        for index, layer in enumerate(self._layers):
            qkv = torch.addmm(layer.qkv_bias, F.rms_norm(x, width, layer.norm1, eps), layer.qkv)
            qkv = qkv.unflatten(1, (-1, backbone.head_dim))
            q, k = rotate(qkv[:, :turned], *rotary).split(parts, dim=1)
            attended = attention(index, q, k, qkv[:, turned:]).flatten(1)
            x = torch.addmm(x, attended, layer.out)
            gate, up = torch.mm(F.rms_norm(x, width, layer.norm2, eps), layer.gate_up).chunk(2, dim=1)
            x = torch.addmm(x, swiglu(gate, up), layer.down)
        return self._norm(x)


@dataclass(frozen=True)
class JoinedLayer:
    """Weights are (in, out)."""

    norm1: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


def _join(layer: Layer) -> JoinedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return JoinedLayer(
        layer.input_layernorm.weight.data,
        _side_by_side(*projections),
        torch.cat([linear.bias.data for linear in projections]),
        attention.o_proj.weight.T,
        layer.post_attention_layernorm.weight.data,
        _side_by_side(mlp.gate_proj, mlp.up_proj),
        mlp.down_proj.weight.T,
    )


def _side_by_side(*linears: nn.Linear) -> Tensor:
    """Return (in, out of all), stored in this order; the linears' weights become views of it."""
    weight = torch.cat([linear.weight.data.T for linear in linears], dim=1)
    sizes = [linear.out_features for linear in linears]
    for linear, view in zip(linears, weight.split(sizes, dim=1), strict=True):
        linear.weight.data = view.T
    return weight
