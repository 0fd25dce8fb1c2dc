"""Comparisons with golden values, one module per component of the model.

Each module lists its checks as `CHECKS: list[Callable[[Golden], Iterator[Comparison]]]`; `test/parity.py`
finds and runs them. A check reads all sizes from the golden folder, so it works for any model.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from light_tts.models.checkpoint.any_config import load_any_config


@dataclass(frozen=True)
class Comparison:
    """`got` and `expected`: arrays of the same shape, or any values that are compared with ==. `tolerance`:
    the largest allowed absolute difference; 0 means exact."""

    stage: str
    got: Any
    expected: Any
    tolerance: float = 0.0


class MissingGolden(Exception):
    """The folder lacks the file that the check needs."""


class Golden:
    """One golden folder: `checkpoint/`, `prompt.wav` and the expected values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.arrays = cache(self._arrays)

    @cached_property
    def config(self) -> Any:
        """The Config or Config3 of the checkpoint."""
        return load_any_config(self.checkpoint)

    def path(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise MissingGolden(name)
        return path

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays of a .npz file."""
        with np.load(self.path(name)) as file:
            return dict(file)

    def tensor(self, name: str, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays(name)[key])


Check = Callable[[Golden], Iterator[Comparison]]


def all_checks(only: set[str] | None = None) -> Iterator[tuple[str, Check]]:
    """Yield (component, check) of every module in this package that has checks; `only`: restricts the
    components."""
    for module in pkgutil.iter_modules(__path__):
        if only is None or module.name in only:
            for check in getattr(importlib.import_module(f"{__name__}.{module.name}"), "CHECKS", ()):
                yield module.name, check
