"""ONNX files with weights in half precision: half the size, while computing in single precision."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 17
SMALLEST = 64  # minimum number of values of a tensor to be converted


def part_of(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights of the submodule `name`, with names relative to it."""
    return {
        key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")
    }


def rounded(module: nn.Module) -> nn.Module:
    """Round the weights of the module in place to the precision of the file; return the module."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())
    return module


@torch.no_grad()
def write_onnx(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: list[str],
    output: str,
    dynamic: dict[str, dict[int, str]],
    path: Path,
) -> None:
    """Write `module`, which is on the CPU. `dynamic`: names of the variable axes."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter warns that it is the older one
        single = Path(folder) / "single.onnx"
        torch.onnx.export(
            module.eval(),
            example,
            str(single),
            input_names=inputs,
            output_names=[output],
            dynamic_axes=dynamic,
            opset_version=OPSET,
            dynamo=False,
        )
        model = onnx.load(single)
    _halve(model.graph)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    onnx.save(model, unfinished)
    unfinished.replace(path)


def _halve(graph: onnx.GraphProto) -> None:
    """Convert weights to float16 followed by a Cast, which runtimes fold when they load the file."""
    casts = []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < SMALLEST:
            continue
        half = f"{weight.name}.half"
        casts.append(helper.make_node("Cast", [half], [weight.name], to=TensorProto.FLOAT))
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), half))
    for cast in reversed(casts):
        graph.node.insert(0, cast)
