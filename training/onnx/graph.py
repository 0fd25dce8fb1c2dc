"""A mutable ONNX graph with pattern matching."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

# The name of a variable ("#...": of a constant), or an operator, perhaps attributes that it must have, and
# patterns of all its inputs.
Pattern = str | tuple[Any, ...]
COMMUTATIVE = ("Add", "Mul")


@dataclass(frozen=True)
class OnnxNode:
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """The names that the variables stand for, and the node of each operator (of several with
    one name: any of them)."""

    names: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, OnnxNode] = field(default_factory=dict)


class Graph:
    """Nodes in an order in which they can run, constants by name, and the names of the outputs."""

    def __init__(
        self, nodes: Sequence[OnnxNode], constants: dict[str, Tensor], outputs: Sequence[str]
    ) -> None:
        self.nodes = list(nodes)
        self.constants = dict(constants)
        self.outputs = list(outputs)
        self._maker: dict[str, OnnxNode] = {}

    @classmethod
    def read(cls, path: Path, outputs: Sequence[str] | None = None) -> Graph:
        """`outputs`: also from within the graph; None: those of the graph."""
        graph = onnx.load(path).graph
        nodes = [
            OnnxNode(
                node.op_type,
                tuple(node.input),
                tuple(node.output),
                {a.name: helper.get_attribute_value(a) for a in node.attribute},
            )
            for node in graph.node
        ]
        constants = {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in graph.initializer}
        return cls(nodes, constants, outputs or [output.name for output in graph.output])

    def rewrite(self, change: Callable[[OnnxNode], Iterable[OnnxNode]]) -> None:
        """Each node becomes those that `change` gives, which sees what has become of the ones before."""
        nodes, self.nodes, self._maker = self.nodes, [], {}
        for node in nodes:
            self._maker.update(dict.fromkeys(node.outputs, node))
            for new in change(node):
                self.nodes.append(new)
                self._maker.update(dict.fromkeys(new.outputs, new))

    def derived(self, make: Callable[..., Tensor], *names: str) -> str:
        """The name of what `make` makes of constants: one, however often it is asked for."""
        name = f"{make.__name__}({', '.join(names)})"
        if name not in self.constants:
            self.constants[name] = make(*(self.constants.get(n) for n in names)).contiguous()
        return name

    def match(self, pattern: Pattern, name: str, known: Match | None = None) -> Match | None:
        """If `name` comes about as in the pattern, in which a variable stands for one tensor everywhere."""
        known = known or Match()
        if isinstance(pattern, str):
            if known.names.get(pattern, name) != name or (pattern[0] == "#" and name not in self.constants):
                return None
            return replace(known, names={**known.names, pattern: name})
        operator, *parts = pattern
        node = self._maker.get(name)
        if node is None or node.operator != operator:
            return None
        if parts and isinstance(parts[0], dict):
            wanted = parts.pop(0)
            if any(node.attributes.get(key) != value for key, value in wanted.items()):
                return None
        known = replace(known, nodes={**known.nodes, operator: node})
        for inputs in (node.inputs, node.inputs[::-1]) if operator in COMMUTATIVE else (node.inputs,):
            found: Match | None = known if len(inputs) == len(parts) else None
            for part, taken in zip(parts, inputs, strict=False):  # as many, or nothing is found
                found = found and self.match(part, taken, found)
            if found:
                return found
        return None

    def drop_unread(self) -> None:
        read, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if not read.isdisjoint(node.outputs):
                kept.append(node)
                read.update(node.inputs)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in read}
