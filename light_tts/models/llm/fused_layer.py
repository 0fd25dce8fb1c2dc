"""The weights of `SpeechLM`'s layers, joined for as few kernels per layer as possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.kernels.llm.small_linear import fold_rms_norm
from light_tts.models.llm.speech_lm import Layer, RMSNorm


@dataclass(frozen=True)
class FusedLayer:
    """`qkv`, `gate_up`: concatenated weights of linears with the same input, multiplied by the weight of the
    preceding norm."""

    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


def fuse(layer: Layer) -> FusedLayer:
    """Return the layer's weights; its linears become views of them, and its norms' weights one."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return FusedLayer(
        qkv=join_weights(layer.input_layernorm, *projections),
        qkv_bias=join_biases(*projections),
        out=attention.o_proj.weight,
        gate_up=join_weights(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight,
    )


def fuse_head(norm: RMSNorm, head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return the weight of a linear, multiplied by that of the norm before it, and its bias or None. Zeros
    are appended until the number of outputs is a multiple of 4, so that rows of outputs are aligned. As in
    `join_weights`, the linear's parameters become views of them."""
    outputs, missing = head.out_features, -head.out_features % 4
    head.weight.data = F.pad(head.weight.data, (0, 0, 0, missing))
    weight = join_weights(norm, head)
    head.weight.data = weight[:outputs]
    if head.bias is None:
        return weight, None
    bias = F.pad(head.bias.data, (0, missing))
    head.bias.data = bias[:outputs]
    return weight, bias


def join_weights(norm: RMSNorm, *linears: nn.Linear) -> Tensor:
    """Return the weight of one linear that combines the given ones with the norm before them; their weights
    become views of it."""
    weight = fold_rms_norm(torch.cat([linear.weight.data for linear in linears]), norm.weight.data)
    norm.weight.data = torch.ones_like(norm.weight)
    for linear, view in zip(linears, weight.split([len(linear.weight) for linear in linears]), strict=True):
        linear.weight.data = view
    return weight


def join_biases(*linears: nn.Linear) -> Tensor:
    """Return the concatenated biases; theirs become views of it."""
    bias = torch.cat([linear.bias.data for linear in linears])
    for linear, view in zip(linears, bias.split([len(linear.bias) for linear in linears]), strict=True):
        linear.bias.data = view
    return bias
