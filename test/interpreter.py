"""Triton's interpreter, which runs the kernels where there is no GPU.

It is slow: it takes long for each operation of each program, hardly longer for a large tile than for a small
one. So tests that are not about tiles choose large ones there, and long grids of parameters are thinned."""

from __future__ import annotations

import functools

import torch

GPU = torch.cuda.is_available()


class _Kept:
    """In place of what would undo the changes."""

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
