"""Loads checkpoint files into modules. Any problem with a file is reported as a CheckpointError."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CheckpointError(Exception):
    """A checkpoint file that cannot be used; the message names the file and, if applicable, the tensor."""


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a flat `torch.save` file, on the CPU (memory-mapped if the format allows).
    Entries that are not tensors (training counters) are omitted."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # the rest of its message suggests disabling the safe mode
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().split("\n")[0]
        problem = f"found something else: {reason}" if reason else "found something else"
        raise CheckpointError(f"{path}: expected a torch.save file of tensors, {problem}") from None
    except Exception as error:  # torch.load raises a dozen types for a bad file
        reason = str(error).strip().split(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path}: expected a torch.save file, found a damaged one: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a flat dictionary of tensors, found {type(state).__name__}")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


class _NoInitialValues(TorchFunctionMode):
    """Skips the computation of parameters' initial values: random ones, and the norms of weight norm."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        if name == "norm_except_dim":
            weight, _, dim = args
            return weight.new_empty([size if axis == dim else 1 for axis, size in enumerate(weight.shape)])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Context manager in which new modules have parameters on the meta device, see `load_into`. Without it,
    PyTorch would import its compiler, which takes a second, to compute their initial values."""
    with torch.device("meta"), _NoInitialValues():
        yield


def shape_of(state: Mapping[str, Tensor], name: str, dims: int, path: Path) -> tuple[int, ...]:
    """Return the shape of a tensor that determines a size of the model. Raises CheckpointError."""
    if name not in state:
        raise CheckpointError(f"{path}: tensor {name}: expected {dims} dimensions, found none (missing)")
    shape = tuple(state[name].shape)
    if len(shape) != dims:
        raise CheckpointError(f"{path}: tensor {name}: expected {dims} dimensions, found shape {shape}")
    return shape


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    unused: Collection[str] = (),
    device: torch.device = CPU,
) -> None:
    """Copy `state` into `module`, strictly: names and shapes must match. Tensors of a module on the meta
    device are created on `device`, except the `unused` ones. Raises CheckpointError for the first mismatch,
    with the number of others.
    """
    own = module.state_dict()
    problems = []
    for name, tensor in own.items():
        expected = tuple(tensor.shape)
        if name not in state:
            problems.append(f"tensor {name}: expected shape {expected}, found none (missing)")
        elif state[name].shape != tensor.shape:
            problems.append(f"tensor {name}: expected shape {expected}, found {tuple(state[name].shape)}")
    for name in state:
        if name not in own:
            problems.append(f"tensor {name}: expected none, found shape {tuple(state[name].shape)}")
    if problems:
        more = f" (and {len(problems) - 1} more tensors differ)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path}: {problems[0]}{more}")
    create = any(tensor.is_meta for tensor in own.values())
    if create:
        state = {
            name: tensor if name in unused else state[name].to(device, tensor.dtype, copy=True)
            for name, tensor in own.items()
        }
    module.load_state_dict(state, strict=True, assign=create)
