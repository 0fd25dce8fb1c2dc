"""Runs an ONNX graph in PyTorch, operator by operator, so that the teacher, an int8 graph for a CPU, runs on
a GPU. The graph is simplified once, see `simplify.py`: weights are converted from int8; activations, which
the graph would round to int8, stay float32.

Supports only the operators used by the teacher. Shapes and indices stay on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from training.onnx.graph import Graph, OnnxNode
from training.onnx.simplify import simplify

Attributes = dict[str, Any]
Inputs = list[Tensor | None]
TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}
# What PyTorch has under another name.
PLAIN = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Cos": torch.cos,
    "Equal": torch.eq,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
}
SMALL = 256  # integers of so many elements are shapes and the like, and stay on the host
# So do small constants at these inputs: what is found by them, or in a part of them that a shape takes, would
# make the host wait for the device.
OF_HOST = {"Resize": (1, 2), "Slice": (0,)}


class OnnxModule:
    """`outputs`: names of the tensors wanted, also from within the graph; None: those of the graph."""

    def __init__(self, path: Path, device: torch.device, outputs: Sequence[str] | None = None) -> None:
        graph = Graph.read(path, outputs)
        with torch.inference_mode():
            simplify(graph, Operators(torch.device("cpu")).run)
        self.outputs = graph.outputs
        self._operators = Operators(device)
        of_host = {
            name
            for node in graph.nodes
            for place, name in enumerate(node.inputs)
            if place in OF_HOST.get(node.operator, ())
        }
        self._weights = {
            name: value if _is_small(value, name in of_host) else value.to(device)
            for name, value in graph.constants.items()
        }
        last_use = {name: number for number, node in enumerate(graph.nodes) for name in node.inputs}
        finished: dict[int, list[str]] = {}
        for name, number in last_use.items():
            if name not in self._weights and name not in self.outputs and name:
                finished.setdefault(number, []).append(name)
        self._steps = [(node, finished.get(number, [])) for number, node in enumerate(graph.nodes)]

    @torch.inference_mode()
    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """The graph's inputs by name -> the outputs, in their order."""
        values: dict[str, Tensor | None] = {**self._weights, "": None}
        device = self._operators.device
        values.update({name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()})
        for node, finished in self._steps:
            results = self._operators.run(node, [values[name] for name in node.inputs])
            values.update(zip(node.outputs, results, strict=False))
            for name in finished:
                del values[name]
        return [values[name] for name in self.outputs]


class Operators:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lstms: dict[str, torch.nn.LSTM] = {}  # by the name of their weight

    def run(self, node: OnnxNode, inputs: Inputs) -> Sequence[Tensor]:
        if node.operator in PLAIN:
            result = PLAIN[node.operator](*self._together(*inputs))
        else:
            result = getattr(self, f"_{node.operator}")(inputs, node.attributes, node.inputs)
        return (result,) if isinstance(result, Tensor) else result

    # -- where tensors lie

    def _together(self, *tensors: Tensor) -> list[Tensor]:
        """On one device: the host only if all are there already. A number may lie anywhere."""
        if all(tensor.is_cpu for tensor in tensors):
            return list(tensors)
        return [tensor.to(self.device, non_blocking=True) if tensor.dim() else tensor for tensor in tensors]

    # -- arithmetic

    def _Div(self, x, *_):
        a, b = self._together(*x)
        return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")

    def _Where(self, x, *_):
        return torch.where(*self._together(*x))

    def _Atan(self, x, *_):
        return torch.atan(torch.nan_to_num(x[0], nan=0.0))  # 0 / 0 of a silent bin

    def _LeakyRelu(self, x, attributes, *_):
        return F.leaky_relu(x[0], attributes.get("alpha", 0.01))

    def _FastGelu(self, x, *_):
        biased = x[0] if len(x) < 2 or x[1] is None else x[0] + x[1]
        return F.gelu(biased, approximate="tanh")

    def _Softmax(self, x, attributes, *_):
        return torch.softmax(x[0], attributes.get("axis", -1))

    def _Clip(self, x, *_):
        low, high = ([*x, None, None])[1:3]
        return torch.clamp(x[0], None if low is None else low.item(), None if high is None else high.item())

    def _CumSum(self, x, *_):
        return torch.cumsum(x[0], int(x[1]))

    def _ReduceMean(self, x, attributes, *_):
        return x[0].mean(dim=_axes(x), keepdim=bool(attributes.get("keepdims", 1)))

    def _ReduceSum(self, x, attributes, *_):
        return x[0].sum(dim=_axes(x), keepdim=bool(attributes.get("keepdims", 1)))

    # -- shapes

    def _Shape(self, x, *_):
        return torch.tensor(x[0].shape, dtype=torch.int64)

    def _Cast(self, x, attributes, *_):
        return x[0].to(TYPES[attributes["to"]])

    def _Reshape(self, x, *_):
        y, sizes = x[0], x[1].tolist()
        return y.reshape([y.shape[i] if size == 0 else size for i, size in enumerate(sizes)])

    def _Transpose(self, x, attributes, *_):
        return x[0].permute(*attributes["perm"])

    def _Unsqueeze(self, x, *_):
        y, axes = x[0], x[1].tolist()
        rank = y.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            y = y.unsqueeze(axis)
        return y

    def _Squeeze(self, x, *_):
        if len(x) < 2 or x[1] is None:
            return x[0].squeeze()
        return x[0].squeeze(x[1].tolist())

    def _Concat(self, x, attributes, *_):
        return torch.cat(self._together(*x), dim=attributes["axis"])

    def _Expand(self, x, *_):
        return x[0].expand(torch.broadcast_shapes(x[0].shape, x[1].tolist()))

    def _ConstantOfShape(self, x, attributes, *_):
        value = torch.from_numpy(np.array(numpy_helper.to_array(attributes["value"])))
        device = self.device if value.is_floating_point() else "cpu"
        return torch.full(x[0].tolist(), value.item(), dtype=value.dtype, device=device)

    def _Range(self, x, *_):
        start, end, step = (value.item() for value in x)
        return torch.arange(start, end, step, dtype=x[1].dtype, device=x[1].device)

    def _NonZero(self, x, *_):
        return torch.nonzero(x[0]).t().contiguous()

    def _Split(self, x, attributes, *_):
        axis = attributes.get("axis", 0)
        if len(x) > 1 and x[1] is not None:
            return torch.split(x[0], x[1].tolist(), axis)
        return torch.chunk(x[0], attributes.get("num_outputs", 2), axis)

    def _Slice(self, x, *_):
        y, starts, ends = x[0], x[1].tolist(), x[2].tolist()
        axes = x[3].tolist() if len(x) > 3 and x[3] is not None else range(len(starts))
        steps = x[4].tolist() if len(x) > 4 and x[4] is not None else [1] * len(starts)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            size = y.shape[axis]
            if step == 1:
                start, end, _ = slice(start, end).indices(size)
                y = y.narrow(axis, start, max(end - start, 0))
            else:
                chosen = range(size)[start:end:step]
                y = y.index_select(axis, torch.tensor(chosen, dtype=torch.int64, device=y.device))
        return y

    def _Gather(self, x, attributes, *_):
        data, index = x
        axis = attributes.get("axis", 0)
        if index.dim() == 0 and index.is_cpu:
            return data.select(axis, index.item())
        data, index = self._together(data, index)
        return data[(slice(None),) * axis + (index,)]

    def _ScatterND(self, x, *_):
        data, index, updates = self._together(*x)
        result = data.clone()
        result[tuple(index.unbind(-1))] = updates.to(result.dtype)
        return result

    def _Pad(self, x, attributes, *_):
        pads = x[1].tolist()
        rank = len(pads) // 2
        sizes = [size for axis in reversed(range(rank)) for size in (pads[axis], pads[axis + rank])]
        while len(sizes) > 2 and sizes[-2:] == [0, 0]:
            sizes = sizes[:-2]
        mode = attributes.get("mode", b"constant").decode()
        if mode == "constant":
            return F.pad(x[0], sizes, value=float(x[2]) if len(x) > 2 and x[2] is not None else 0.0)
        if x[0].dim() == 2:
            return F.pad(x[0][None], sizes, mode=mode)[0]
        return F.pad(x[0], sizes, mode=mode)

    def _Resize(self, x, attributes, *_):
        """Normalises over the last axis."""
        given = len(x) > 2 and x[2] is not None and x[2].numel()
        factor = float(x[2][-1]) if given else int(x[3][-1]) / x[0].shape[-1]
        if attributes["mode"] == b"nearest":
            return F.interpolate(x[0], scale_factor=factor, mode="nearest", recompute_scale_factor=False)
        return F.interpolate(
            x[0], scale_factor=factor, mode="linear", align_corners=False, recompute_scale_factor=False
        )

    # -- layers

    def _Linear(self, x, *_):
        return F.linear(*x)

    def _SelfAttention(self, x, attributes, *_):
        """(batch, steps, channels) -> the same"""
        parts = F.linear(*x).unflatten(-1, (3, attributes["heads"], -1))
        return F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    def _InstanceNorm(self, x, attributes, *_):
        """As a norm of groups of one channel, whose weights are those of all samples."""
        batch, channels, steps = x[0].shape
        rows = x[0].reshape(1, batch * channels, steps)
        weight, bias = (value.reshape(-1) for value in x[1:])
        return F.group_norm(rows, batch * channels, weight, bias, attributes["epsilon"]).view_as(x[0])

    def _Snake(self, x, *_):
        y, a, b = x
        return torch.addcmul(y, b, (a * y).sin_().square_())

    def _FusedMatMul(self, x, attributes, *_):
        a, b = x
        a = a.transpose(-1, -2) if attributes.get("transA") else a
        b = b.transpose(-1, -2) if attributes.get("transB") else b
        return attributes.get("alpha", 1.0) * (a @ b)

    def _LayerNormalization(self, x, attributes, *_):
        bias = x[2] if len(x) > 2 else None
        return F.layer_norm(x[0], x[1].shape, x[1], bias, attributes["epsilon"])

    def _SkipLayerNormalization(self, x, attributes, *_):
        total = x[0] + x[1]
        if len(x) > 4 and x[4] is not None:
            total = total + x[4]
        return F.layer_norm(total, x[2].shape, x[2], x[3], attributes["epsilon"])

    def _Conv(self, x, attributes, *_):
        return _convolve(x[0], x[1], x[2] if len(x) > 2 else None, attributes)

    def _ConvTranspose(self, x, attributes, *_):
        return F.conv_transpose1d(
            x[0],
            x[1],
            x[2] if len(x) > 2 else None,
            stride=tuple(attributes["strides"]),
            padding=attributes["pads"][0],
            output_padding=attributes.get("output_padding", [0])[0],
            groups=attributes.get("group", 1),
        )

    def _STFT(self, x, *_):
        """signal (batch, samples[, 1]), hop, window, length -> (batch, frames, bins, 2)"""
        signal = x[0][..., 0] if x[0].dim() == 3 else x[0]
        length = int(x[3]) if len(x) > 3 and x[3] is not None else x[2].numel()
        frames = signal.unfold(-1, length, int(x[1])) * x[2]
        return torch.view_as_real(torch.fft.rfft(frames, dim=-1))

    # -- int8

    def _DequantizeLinear(self, x, *_):
        zero = x[2].float() if len(x) > 2 and x[2] is not None else 0.0
        return (x[0].float() - zero) * x[1]

    def _DynamicQuantizeLSTM(self, x, attributes, names):
        if names[1] not in self._lstms:
            self._lstms[names[1]] = self._lstm(x, attributes["hidden_size"])
        y, (hidden, cell) = self._lstms[names[1]](x[0])
        steps, batch, _ = y.shape
        return y.reshape(steps, batch, 2, -1).permute(0, 2, 1, 3), hidden, cell

    def _lstm(self, x: Inputs, hidden: int) -> torch.nn.LSTM:
        """x: X, W, R, B, ..., W scale and zero at 8 and 9, R's at 10 and 11; W, R: (directions, inputs, 4 *
        hidden) with ONNX's order of gates: input, output, forget, cell"""

        def dequantized(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
            shape = (-1, 1, scale.numel() // len(weight)) if scale.numel() > 1 else (1, 1, 1)
            return (weight.float() - zero.float().reshape(shape)) * scale.reshape(shape)

        def ordered(gates: Tensor) -> Tensor:
            """In PyTorch's order: input, forget, cell, output."""
            into, out, forget, cell = gates.chunk(4, 0)
            return torch.cat([into, forget, cell, out], 0)

        w, r = dequantized(x[1], x[8], x[9]), dequantized(x[2], x[10], x[11])
        lstm = torch.nn.LSTM(w.shape[1], hidden, bidirectional=True).to(self.device).eval()
        with torch.no_grad():
            for direction, suffix in enumerate(("", "_reverse")):
                getattr(lstm, f"weight_ih_l0{suffix}").copy_(ordered(w[direction].t()))
                getattr(lstm, f"weight_hh_l0{suffix}").copy_(ordered(r[direction].t()))
                getattr(lstm, f"bias_ih_l0{suffix}").copy_(ordered(x[3][direction][: 4 * hidden]))
                getattr(lstm, f"bias_hh_l0{suffix}").copy_(ordered(x[3][direction][4 * hidden :]))
        return lstm


def _is_small(constant: Tensor, is_of_host: bool) -> bool:
    """A number, or a shape or the like."""
    is_shape = constant.dtype == torch.int64 or is_of_host
    return constant.dim() == 0 or (is_shape and constant.numel() <= SMALL)


def _axes(x: Inputs) -> list[int]:
    return x[1].tolist() if len(x) > 1 and x[1] is not None else list(range(x[0].dim()))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, attributes: Attributes) -> Tensor:
    pads = attributes["pads"]
    rank = len(pads) // 2
    if pads[:rank] != pads[rank:]:
        x, pads = F.pad(x, (pads[0], pads[1])), [0]
    return (F.conv1d if rank == 1 else F.conv2d)(
        x,
        weight,
        bias,
        stride=tuple(attributes["strides"]),
        padding=tuple(pads[:rank]),
        dilation=tuple(attributes["dilations"]),
        groups=attributes.get("group", 1),
    )
