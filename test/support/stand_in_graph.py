"""In place of a CUDA graph on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class StandInGraph:
    """Runs the function again; its result stays where that of the recording is."""

    def __init__(self, function: Callable[[], Any], result: torch.Tensor | None) -> None:
        self._function, self._result = function, result
        self.replays = 0

    @torch.inference_mode()
    def replay(self) -> None:
        self.replays += 1
        result = self._function()
        if self._result is not None:
            self._result.copy_(result)


def capture(function: Callable[[], Any], pool: Callable[[], Any]) -> tuple[StandInGraph, Any]:
    """In place of `cuda_graphs.capture`. Runs the function, which has no effect as the inputs are empty."""
    result = function()
    return StandInGraph(function, result), result
