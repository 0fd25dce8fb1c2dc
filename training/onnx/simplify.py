"""Makes of an int8 ONNX graph a float one with far fewer nodes, for `module.py`: what is constant is
computed once, and what an exporter has taken apart becomes one node again.

A rule is a pattern and what takes its place. What is in between may have other readers: it goes only when
nobody reads it any more. Beside ONNX's operators there are then

    Linear(x, weight (outputs, inputs)[, bias])
    SelfAttention(x, weight, bias), heads: weight and bias make queries, keys and values
    InstanceNorm(x, weight, bias), epsilon: over the last of three axes; a weight and bias of each sample
    Snake(x, a, b): x + b * sin(a * x) ** 2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from training.onnx.graph import Graph, Match, OnnxNode, Pattern

Runner = Callable[[OnnxNode, list[Tensor | None]], Sequence[Tensor]]
Become = Callable[[Graph, OnnxNode, Match], list[OnnxNode]]


def simplify(graph: Graph, run: Runner) -> None:
    """`run`: computes a node on the host."""
    graph.rewrite(lambda node: [_with_whole_bias(graph, node)])
    _drop_quantisation(graph)
    _fold(graph, run)
    for pattern, become in RULES:
        graph.rewrite(lambda node, rule=(pattern, become): _ruled(graph, node, *rule))
    graph.drop_unread()
    _join_columns(graph)
    graph.drop_unread()


def _fold(graph: Graph, run: Runner) -> None:
    def change(node: OnnxNode) -> list[OnnxNode]:
        if any(name and name not in graph.constants for name in node.inputs):
            return [node]
        values = run(node, [graph.constants.get(name) for name in node.inputs])
        graph.constants.update(zip(node.outputs, values, strict=False))
        return []

    graph.rewrite(change)


# -- int8


def _with_whole_bias(graph: Graph, node: OnnxNode) -> OnnxNode:
    """A bias comes divided by the scale of the sum that it is added to, and rounded as that one is."""
    scale = ("Mul", ("DynamicQuantizeLinear", "x"), "#scale")
    pattern = ("Cast", {"to": TensorProto.INT32}, ("Floor", ("Div", "#bias", scale)))
    found = graph.match(pattern, node.outputs[0]) if node.operator == "Cast" else None
    return replace(found.nodes["Div"], outputs=node.outputs) if found else node


def _drop_quantisation(graph: Graph) -> None:
    """Activations stay as they are (scale 1, zero 0), weights become float."""
    values: dict[str, str] = {}

    def change(node: OnnxNode) -> list[OnnxNode]:
        inputs = tuple(values.get(name, name) for name in node.inputs)
        if node.operator == "DynamicQuantizeLinear":
            values[node.outputs[0]] = inputs[0]
            graph.constants.update(zip(node.outputs[1:], (torch.tensor(1.0), torch.tensor(0.0)), strict=True))
            return []
        if node.operator in ("MatMulInteger", "ConvInteger"):
            operator = node.operator.removesuffix("Integer")
            whole = _whole_kernel if operator == "Conv" else _whole
            zeros = [*inputs[2:], "", ""]
            sides = (
                graph.derived(whole, side, zero) if side in graph.constants else side
                for side, zero in zip(inputs[:2], zeros, strict=False)
            )
            return [OnnxNode(operator, tuple(sides), node.outputs, node.attributes)]
        if node.operator == "DynamicQuantizeLSTM":
            # The states that it starts with, which are zero anyway, would come from shapes.
            inputs = (*inputs[:4], "", "", "", "", *inputs[8:])
        return [replace(node, inputs=inputs)]

    graph.rewrite(change)


def _whole(weight: Tensor, zero: Tensor | None) -> Tensor:
    return weight.float() - (0.0 if zero is None else zero.float())


def _whole_kernel(weight: Tensor, zero: Tensor | None) -> Tensor:
    """Zeros of a convolution: one of each output channel, or one of all."""
    return _whole(weight, zero if zero is None else zero.reshape(-1, *[1] * (weight.dim() - 1)))


# -- what a pattern becomes: no nodes if it does not apply after all


def _ruled(graph: Graph, node: OnnxNode, pattern: Pattern, become: Become) -> list[OnnxNode]:
    found = graph.match(pattern, node.outputs[0]) if node.operator == pattern[0] else None
    return (found and become(graph, node, found)) or [node]


def _linear(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    x, weight, scale = (found.names[name] for name in ("x", "#weight", "#scale"))
    if graph.constants[weight].dim() != 2 or graph.constants[scale].dim() > 1:
        return []
    return [OnnxNode("Linear", (x, graph.derived(_scaled_transposed, weight, scale)), node.outputs)]


def _scaled_transposed(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight * scale).t()


def _biased_linear(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    x, weight, bias = (found.names[name] for name in ("x", "#weight", "#bias"))
    if graph.constants[bias].shape != graph.constants[weight].shape[:1]:
        return []
    if node.operator == "Add":
        return [OnnxNode("Linear", (x, weight, bias), node.outputs)]
    inner = f"{node.outputs[0]} before"
    return [OnnxNode("Linear", (x, weight, bias), (inner,)), replace(node, inputs=(inner,))]


def _convolution(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    x, weight, scale = (found.names[name] for name in ("x", "#weight", "#scale"))
    if graph.constants[scale].numel() != 1:
        return []
    inputs = [x, graph.derived(torch.mul, weight, scale)]
    if "#bias" in found.names:
        inputs.append(graph.derived(_scaled_flat, found.names["#bias"], scale))
    return [OnnxNode("Conv", tuple(inputs), node.outputs, found.nodes["Conv"].attributes)]


def _scaled_flat(bias: Tensor, scale: Tensor) -> Tensor:
    return (bias * scale).flatten()


def _instance_norm(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    axes, epsilon = (graph.constants[found.names[name]] for name in ("#axes", "#epsilon"))
    if axes.tolist() != [2]:
        return []
    inputs = tuple(found.names[name] for name in ("x", "weight", "bias"))
    return [OnnxNode("InstanceNorm", inputs, node.outputs, {"epsilon": epsilon.item()})]


def _snake(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    if graph.constants[found.names["#two"]].item() != 2:
        return []
    return [OnnxNode("Snake", tuple(found.names[name] for name in ("x", "#a", "#b")), node.outputs)]


def _reshape_to_heads(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    """Sizes that remain are 0."""
    names = [found.names[name] for name in ("#0", "#1", "#heads", "#size")]
    if [graph.constants[name].item() for name in names[:2]] != [0, 1]:
        return []
    sizes = graph.derived(_heads_sizes, *names[2:])
    return [OnnxNode("Reshape", (found.names["y"], sizes), node.outputs)]


def _heads_sizes(heads: Tensor, size: Tensor) -> Tensor:
    return torch.cat([torch.zeros(2, dtype=torch.int64), heads, size])


def _self_attention(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    constants = {variable: graph.constants.get(name) for variable, name in found.names.items()}
    expected = {"#0": 0, "#1": 1, "#one": 1, "#start": -1, "#shown": 1}
    is_as_thought = (
        all(constants[variable].item() == value for variable, value in expected.items())
        and constants["#perm"].tolist()[-1] == 3
        and numpy_helper.to_array(found.nodes["ConstantOfShape"].attributes["value"]).item() == 1
    )
    if not is_as_thought:
        return []
    weight, bias = (
        graph.derived(_stacked, *(found.names[f"#{part} {kind}"] for part in ("query", "key", "value")))
        for kind in ("weight", "bias")
    )
    heads = constants["#sizes"][2].item()
    return [OnnxNode("SelfAttention", (found.names["x"], weight, bias), node.outputs, {"heads": heads})]


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _columns(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    """A linear of each part: `_join_columns` makes one of all that have the same input."""
    if node.attributes.get("axis") != 1 or graph.constants[found.names["#axes"]].tolist() != [2]:
        return []
    x, weight, bias, sizes, axes = (found.names[n] for n in ("x", "#weight", "#bias", "#sizes", "#axes"))
    parts = (graph.constants[name].split(graph.constants[sizes].tolist()) for name in (weight, bias))
    nodes = []
    for output, *rows in zip(node.outputs, *parts, strict=True):
        names = f"{output} weight", f"{output} bias"
        graph.constants.update(zip(names, rows, strict=True))
        nodes.append(OnnxNode("Columns", (x, *names, axes), (output,)))
    return nodes


def _shifted_columns(graph: Graph, node: OnnxNode, found: Match) -> list[OnnxNode]:
    if graph.constants[found.names["#shift"]].numel() != 1:
        return []
    bias = graph.derived(torch.add, found.names["#bias"], found.names["#shift"])
    names = found.names
    return [OnnxNode("Columns", (names["x"], names["#weight"], bias, names["#axes"]), node.outputs)]


def _join_columns(graph: Graph) -> None:
    """Columns of one input become one Linear, one Unsqueeze and one Split, where the first of them is."""
    groups: dict[str, list[OnnxNode]] = {}
    for node in graph.nodes:
        if node.operator == "Columns":
            groups.setdefault(node.inputs[0], []).append(node)

    def change(node: OnnxNode) -> list[OnnxNode]:
        if node.operator != "Columns":
            return [node]
        x, _, _, axes = node.inputs
        group = groups.pop(x, [])
        if not group:
            return []
        flat, columns, sizes = (f"{name} of {x}" for name in ("linears", "columns", "sizes"))
        graph.constants[sizes] = torch.tensor([len(graph.constants[member.inputs[2]]) for member in group])
        weight, bias = (graph.derived(_stacked, *(member.inputs[i] for member in group)) for i in (1, 2))
        outputs = tuple(member.outputs[0] for member in group)
        return [
            OnnxNode("Linear", (x, weight, bias), (flat,)),
            OnnxNode("Unsqueeze", (flat, axes), (columns,)),
            OnnxNode("Split", (columns, sizes), outputs, {"axis": 1}),
        ]

    graph.rewrite(change)


# -- patterns


def _size(of: str, axis: str) -> Pattern:
    return ("Unsqueeze", ("Gather", ("Shape", of), axis), f"{axis} axes")


def _linear_of(part: str) -> Pattern:
    return ("Linear", "x", f"#{part} weight", f"#{part} bias")


def _heads(part: str, *perm: int) -> Pattern:
    """(batch, steps, heads * size) -> (batch, steps, heads, size), rearranged"""
    return ("Transpose", {"perm": list(perm)}, ("Reshape", _linear_of(part), "#sizes"))


DEVIATION = ("Sub", "x", ("ReduceMean", {"keepdims": 1}, "x", "#axes"))
VARIANCE = ("ReduceMean", {"keepdims": 1}, ("Mul", DEVIATION, DEVIATION), "#axes")
NORMALISED = ("Div", DEVIATION, ("Sqrt", ("Add", VARIANCE, "#epsilon")))

SINE = ("Sin", ("Mul", "#a", "x"))

# Of queries and keys: size ** -0.25
SIZES = ("Gather", ("Shape", ("Reshape", _linear_of("query"), "#sizes")), "#perm")
LAST_SIZE = ("Slice", SIZES, "#start", "#end")
SCALE = ("Sqrt", ("Div", "#one", ("Sqrt", ("Cast", LAST_SIZE))))
QUERIES = ("Mul", _heads("query", 0, 2, 1, 3), SCALE)
KEYS = ("Mul", _heads("key", 0, 2, 3, 1), SCALE)
# 0, as nothing is masked: 1 - 1
ONES = ("Unsqueeze", ("ConstantOfShape", "shape"), "#mask axes")
SHOWN = ("Sub", "#shown", ("Expand", ONES, "shape of all"))
MASK = ("Where", ("Cast", {"to": TensorProto.BOOL}, SHOWN), "#hidden", SHOWN)
WEIGHTS = ("Softmax", {"axis": -1}, ("Add", ("MatMul", QUERIES, KEYS), MASK))
ATTENDED = ("Transpose", {"perm": [0, 2, 1, 3]}, ("MatMul", WEIGHTS, _heads("value", 0, 2, 1, 3)))

PRODUCT = ("Cast", {"to": TensorProto.FLOAT}, ("MatMul", "x", "#weight"))
SUM = ("Conv", "x", "#weight")
COLUMNS = ("Columns", "x", "#weight", "#bias", "#axes")
BIASED_SUM = ("Cast", {"to": TensorProto.FLOAT}, ("Add", SUM, "#bias"))

# In their order: a pattern may hold what an earlier rule made.
RULES: list[tuple[Pattern, Become]] = [
    (("Mul", PRODUCT, "#scale"), _linear),
    (("Add", ("Linear", "x", "#weight"), "#bias"), _biased_linear),
    (("FastGelu", ("Linear", "x", "#weight"), "#bias"), _biased_linear),
    (("Mul", ("Cast", {"to": TensorProto.FLOAT}, SUM), "#scale"), _convolution),
    (("Mul", BIASED_SUM, "#scale"), _convolution),
    (("Reshape", "y", ("Concat", _size("y", "#0"), _size("y", "#1"), "#heads", "#size")), _reshape_to_heads),
    (("Reshape", ATTENDED, ("Concat", _size("x", "#0"), _size("x", "#1"), "#width")), _self_attention),
    (("Split", ("Unsqueeze", ("Linear", "x", "#weight", "#bias"), "#axes"), "#sizes"), _columns),
    (("Add", COLUMNS, "#shift"), _shifted_columns),
    (("Add", ("Mul", "weight", NORMALISED), "bias"), _instance_norm),
    (("Add", "x", ("Mul", "#b", ("Pow", SINE, "#two"))), _snake),
]
