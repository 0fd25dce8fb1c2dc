"""The language model's linear layers with their weights as `tensor_linear` reads them: a second copy of all
weights, where that kernel is the fastest for a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from light_tts.kernels.llm.tensor_linear import TensorLinear, measured_rows, supported
from light_tts.models.llm.fused_layer import FusedLayer


@dataclass(frozen=True)
class PackedLayer:
    qkv: TensorLinear
    out: TensorLinear
    gate_up: TensorLinear
    down: TensorLinear


@dataclass(frozen=True)
class PackedLayers:
    """`rows`: the numbers of tokens for which these are to be used."""

    layers: list[PackedLayer]
    head: TensorLinear
    rows: range


def packed_layers(
    layers: Sequence[FusedLayer], head: Tensor, head_bias: Tensor | None, eps: float
) -> PackedLayers | None:
    """Return packed copies of the weights; None: they are not to be used on this GPU."""
    rows = measured_rows(head.device, head.dtype)
    if not rows:
        return None
    first = layers[0]
    sizes = [w.shape for w in (head, first.qkv, first.out, first.down)]
    gate_up = first.gate_up
    if not all(supported(*size) for size in sizes):
        return None
    if not supported(len(gate_up) // 2, gate_up.shape[1], gated=True):
        return None
    packed = [
        PackedLayer(
            qkv=TensorLinear(layer.qkv, layer.qkv_bias, eps),
            out=TensorLinear(layer.out),
            gate_up=TensorLinear(layer.gate_up, eps=eps, gated=True),
            down=TensorLinear(layer.down),
        )
        for layer in layers
    ]
    return PackedLayers(packed, TensorLinear(head, head_bias, eps), rows)
