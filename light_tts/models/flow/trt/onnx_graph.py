"""Exports the flow estimator with the loaded weights as an ONNX graph for TensorRT.

Unlike the checkpoint's flow.decoder.estimator.fp32.onnx, it takes the attention mask, which streaming needs,
and any batch size. The graph specifies the types: products (linear, convolution, attention) use the module's
type, everything in between float32, as PyTorch's kernels do internally.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from light_tts.models.flow.masks import Mask
from light_tts.models.flow.unet.estimator import (
    CausalConv1d,
    Estimator,
    EstimatorMasks,
    GeluProjection,
    SelfAttention,
    TimeMLP,
)

INPUTS = ("x", "frames", "attention", "mu", "t", "spks", "cond")
OUTPUT = "velocity"
OPSET = 17
DYNAMIC_AXES = {
    "x": {0: "batch", 2: "frames"},
    "frames": {0: "batch", 2: "frames"},
    "attention": {0: "batch", 2: "frames", 3: "frames"},
    "mu": {0: "batch", 2: "frames"},
    "t": {0: "batch"},
    "spks": {0: "batch"},
    "cond": {0: "batch", 2: "frames"},
    OUTPUT: {0: "batch", 2: "frames"},
}


def input_shapes(channels: int, batch: int, frames: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input. Types: `attention` bool (True: visible), `t` float32, others the
    module's."""
    signal = (batch, channels, frames)
    return {
        "x": signal,
        "frames": (batch, 1, frames),
        "attention": (batch, 1, frames, frames),
        "mu": signal,
        "t": (batch,),
        "spks": (batch, channels),
        "cond": signal,
    }


def graph_inputs(
    x: Tensor, masks: EstimatorMasks, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
) -> dict[str, Tensor]:
    """Return the arguments of `Estimator.forward` as contiguous inputs of the graph."""
    size = x.shape[2]
    if masks.attention is None:
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.device)
    else:
        seen = masks.attention.rows(0, size)
    inputs = {
        "x": x,
        "frames": masks.frames.to(x.dtype),
        "attention": seen.expand(len(x), 1, size, size),
        "mu": mu,
        "t": t.float(),
        "spks": spks,
        "cond": cond,
    }
    return {name: value.contiguous() for name, value in inputs.items()}


@torch.no_grad()
def export(module: Estimator) -> bytes:
    """Return the serialized ONNX model. The module is not modified."""
    graph = _Graph(module).eval()
    weight = module.final_proj.weight
    example = example_inputs(weight.shape[0], 2, 8, weight)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter warns that it is the older one
        path = Path(directory) / "estimator.onnx"
        torch.onnx.export(
            graph,
            tuple(example[name] for name in INPUTS),
            str(path),
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_axes=DYNAMIC_AXES,
            opset_version=OPSET,
            dynamo=False,
        )
        return path.read_bytes()


def example_inputs(channels: int, batch: int, frames: int, like: Tensor) -> Mapping[str, Tensor]:
    """Return random inputs of the graph with the type and device of `like`; nothing is masked."""
    generator = torch.Generator().manual_seed(0)
    shapes = input_shapes(channels, batch, frames)
    inputs = {name: torch.randn(shape, generator=generator).to(like) for name, shape in shapes.items()}
    inputs["frames"] = torch.ones_like(inputs["frames"])
    inputs["attention"] = torch.ones_like(inputs["attention"], dtype=torch.bool)
    inputs["t"] = torch.rand(batch, generator=generator).to(like.device)
    return inputs


class _Graph(nn.Module):
    """A copy of the estimator with plain tensors as arguments and explicit types."""

    def __init__(self, module: Estimator) -> None:
        super().__init__()
        self.estimator = copy.deepcopy(module)
        _rewrite(self.estimator)

    def forward(
        self, x: Tensor, frames: Tensor, attention: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        return self.estimator(x, EstimatorMasks(frames, _GivenMask(attention)), mu, t, spks, cond)


class _GivenMask:
    """The mask of all queries, as a tensor."""

    def __init__(self, whole: Tensor) -> None:
        self._whole = whole

    def rows(self, start: int, end: int) -> Tensor:
        return self._whole


def _rewrite(parent: nn.Module) -> None:
    """Replace, in place, modules that have implicit types or export to needlessly many nodes."""
    for name, child in parent.named_children():
        if isinstance(child, nn.LayerNorm | nn.Mish | TimeMLP):
            setattr(parent, name, _InFloat32(child))
        elif isinstance(child, SelfAttention):
            setattr(parent, name, _Attention(child))
        elif isinstance(child, CausalConv1d):
            setattr(parent, name, _CausalConv(child))
        elif isinstance(child, GeluProjection):
            setattr(parent, name, _Gelu(child))
        else:
            _rewrite(child)


class _InFloat32(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float()).to(x.dtype)


class _Gelu(nn.Module):
    def __init__(self, module: GeluProjection) -> None:
        super().__init__()
        self.proj = module.proj

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x).float()).to(x.dtype)


class _CausalConv(nn.Module):
    """The convolution pads both sides; outputs that depend on the right side are cut off."""

    def __init__(self, module: CausalConv1d) -> None:
        super().__init__()
        self.conv = module
        self.padding = module.kernel_size[0] - 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(x, self.conv.weight, self.conv.bias, padding=self.padding)
        return y[:, :, : -self.padding]


class _Attention(nn.Module):
    """Two products with a float32 softmax in between, a pattern that TensorRT fuses."""

    def __init__(self, module: SelfAttention) -> None:
        super().__init__()
        self.module = module
        self.head_dim = module.to_q.out_features // module.heads

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        shape = (x.shape[0], -1, self.module.heads, self.head_dim)
        q, k, v = (
            linear(x).reshape(shape).transpose(1, 2)
            for linear in (self.module.to_q, self.module.to_k, self.module.to_v)
        )
        scores = ((q * self.head_dim**-0.5) @ k.transpose(2, 3)).float()
        # Finite, so that no sums of infinities occur; far below any score.
        hidden = torch.full((), torch.finfo(torch.float16).min, device=x.device)
        weights = torch.softmax(torch.where(mask.rows(0, x.shape[1]), scores, hidden), dim=-1).to(x.dtype)
        joined = (weights @ v).transpose(1, 2).reshape(x.shape[0], -1, self.module.heads * self.head_dim)
        return self.module.to_out(joined)
