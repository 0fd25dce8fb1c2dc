"""Triton's interpreter, which runs the kernels on machines without a GPU.

It is slow: each operation of each program takes long, but a large tile hardly longer than a small one. So
tests that are not about tiles use large ones, and long parameter grids are thinned out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch

GPU = torch.cuda.is_available()


class _Kept:
    """Replaces the object that would undo the changes."""

    def restore(self) -> None:
        pass


def patch_language_once() -> None:
    """The interpreter replaces what lies in triton.language at each call of a function (and puts it back
    behind each kernel), which takes half of its time. Without a GPU nothing else uses triton.language: once
    for each function is enough."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if hasattr(interpreter, "_patch_lang"):  # private: where it is not, all works as before, only slower
        patch, kept = functools.cache(interpreter._patch_lang), _Kept()
        interpreter._patch_lang = lambda fn: (patch(fn), kept)[1]


def grid(*axes: Sequence) -> list[tuple]:
    """Values for `parametrize`: all combinations on a GPU; in the interpreter so many that each value of an
    axis meets each value of every other one."""
    if GPU:
        return list(itertools.product(*axes))

    def pairs(combination: tuple[int, ...]) -> set:
        return set(itertools.combinations(enumerate(combination), 2))

    combinations = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing = set().union(*map(pairs, combinations))
    chosen = []
    while missing:
        chosen.append(max(combinations, key=lambda combination: len(pairs(combination) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(axis[i] for axis, i in zip(axes, each, strict=True)) for each in sorted(chosen)]
