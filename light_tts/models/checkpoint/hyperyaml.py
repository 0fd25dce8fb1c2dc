"""Reads HyperPyYAML files as plain data: no class is imported, no function is called.

`!new:`, `!name:` and `!apply:` tags are dropped, and their mapping, list or scalar is kept. `!ref <key>` is
resolved on access, so references in unused sections (training settings) may be invalid. Arithmetic on
references and numbers (`!ref <chunk_size> * <token_mel_ratio>`) is evaluated by walking the parsed
expression.
"""

from __future__ import annotations

import ast
import builtins
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_REFERENCE = re.compile(r"<([^<>]+)>")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_MAX_REFERENCE_DEPTH = 32
_REQUIRED = object()


class ConfigError(Exception):
    """A configuration file that cannot be used; the message names the file and the key."""


@dataclass(frozen=True)
class _Reference:
    expression: str


class _Loader(yaml.SafeLoader):
    pass


def _construct_tagged(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_yaml_str(node)


def _construct_reference(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):  # `!ref [<a>, <b>]`
        return [_Reference(str(item)) for item in loader.construct_sequence(node, deep=True)]
    return _Reference(loader.construct_scalar(node))


_Loader.add_multi_constructor("!", _construct_tagged)
_Loader.add_constructor("!ref", _construct_reference)
_Loader.add_constructor("!copy", _construct_reference)


class Node:
    """A mapping in the file with typed access; errors name the file and the dotted key."""

    def __init__(self, file: Path, root: dict, mapping: dict, path: str = "") -> None:
        self.file = file
        self._root = root
        self._mapping = mapping
        self._path = path

    def __contains__(self, key: str) -> bool:
        return self._mapping.get(key) is not None

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file}: key '{self._name(key)}': {problem}")

    def node(self, key: str) -> Node:
        value = self._value(key, _REQUIRED)
        if not isinstance(value, dict):
            raise self.error(key, f"expected a mapping, found {value!r}")
        return Node(self.file, self._root, value, self._name(key))

    def int(self, key: str, default: Any = _REQUIRED) -> builtins.int:
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"expected an integer, found {value!r}")
        return value

    def bool(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected True or False, found {value!r}")
        return value

    def float(self, key: str, default: Any = _REQUIRED) -> builtins.float:
        value = self._value(key, default)
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except (TypeError, ValueError):
            raise self.error(key, f"expected a number, found {value!r}") from None

    def optional_float(self, key: str) -> builtins.float | None:
        """Return the value, or None if the key is missing or null."""
        return self.float(key) if self._value(key, None) is not None else None

    def ints(self, key: str) -> tuple[builtins.int, ...]:
        value = self._value(key, _REQUIRED)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(key, f"expected a list of integers, found {value!r}")
        return tuple(value)

    def int_lists(self, key: str) -> tuple[tuple[builtins.int, ...], ...]:
        value = self._value(key, _REQUIRED)
        if not isinstance(value, list) or not all(isinstance(item, list) for item in value):
            raise self.error(key, f"expected a list of lists, found {value!r}")
        return tuple(Node(self.file, self._root, {key: item}, self._path).ints(key) for item in value)

    def require(self, key: str, allowed: Any) -> None:
        """Raise ConfigError unless the key is missing or has the value `allowed`, the only one
        implemented.
        """
        value = self._value(key, allowed)
        if value != allowed:
            raise self.error(key, f"only {allowed!r} is supported, found {value!r}")

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _value(self, key: str, default: Any) -> Any:
        value = self._mapping.get(key)
        if value is not None:
            value = self._resolve(value, key, 0)
        if value is None:
            if default is _REQUIRED:
                raise self.error(key, "missing")
            return default
        return value

    def _resolve(self, value: Any, key: str, depth: builtins.int) -> Any:
        if depth > _MAX_REFERENCE_DEPTH:
            raise self.error(key, "circular references")
        if isinstance(value, str) and "!ref" in value:  # quoted: '[!ref <a>, !ref <b>]'
            value = self._parse(value, key)
        if isinstance(value, list):
            return [self._resolve(item, key, depth + 1) for item in value]
        if not isinstance(value, _Reference):
            return value
        text = value.expression.strip()
        whole = _REFERENCE.fullmatch(text)
        if whole:
            return self._lookup(whole.group(1), key, depth)
        names: list[str] = []

        def placeholder(match: re.Match) -> str:
            names.append(match.group(1))
            return f"_{len(names) - 1}"

        try:
            tree = ast.parse(_REFERENCE.sub(placeholder, text), mode="eval").body
        except SyntaxError:
            raise self.error(key, f"cannot read the reference {text!r}") from None
        return self._evaluate(tree, names, text, key, depth)

    def _parse(self, text: str, key: str) -> Any:
        try:
            return yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise self.error(key, f"cannot read the reference {text!r}") from None

    def _lookup(self, name: str, key: str, depth: builtins.int) -> Any:
        value: Any = self._root
        for part in re.split(r"[.\[\]]+", name.strip().rstrip("]")):
            value = self._resolve(value, key, depth + 1)
            if not isinstance(value, dict) or part not in value:
                raise self.error(key, f"refers to '{name}', which is not in the file")
            value = value[part]
        return self._resolve(value, key, depth + 1)

    def _evaluate(self, tree: ast.AST, names: list[str], text: str, key: str, depth: builtins.int) -> Any:
        match tree:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name) if name[:1] == "_" and name[1:].isdigit() and int(name[1:]) < len(names):
                number = self._lookup(names[int(name[1:])], key, depth)
                if isinstance(number, int | float):
                    return number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._evaluate(operand, names, text, key, depth)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                sides = [self._evaluate(side, names, text, key, depth) for side in (left, right)]
                try:
                    return _OPERATORS[type(op)](*sides)
                except ZeroDivisionError:
                    pass
        raise self.error(key, f"cannot evaluate the reference {text!r}")


def load(file: Path) -> Node:
    """Parse a file. Raises ConfigError if it is missing, unreadable or malformed."""
    try:
        root = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, dict):
        raise ConfigError(f"{file}: expected a mapping at the top")
    return Node(file, root, root)
