"""Integration of the next frames of one sequence on a CPU, with cached state for the earlier ones."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COPIES = 2  # with and without guidance
ROOM = 128  # extra frames allocated, so that keys and values are rarely moved


class EstimatorMemory:
    """State of the first `frames` frames for later ones: keys and values of each step and transformer, and
    the preceding frames of each convolution's input (empty: zeros)."""

    def __init__(self, layers: int, inner: int) -> None:
        """layers: number of transformers in all steps together; inner: channels of a key."""
        self.frames = 0
        self.edges: list[Tensor] = []  # in the order in which a run uses them
        self._keys_values = torch.empty(layers, 2, COPIES, 0, inner)

    @property
    def bytes(self) -> int:
        return self._keys_values.nbytes

    def copy(self) -> EstimatorMemory:
        """Return an independent copy to continue from."""
        other = copy.copy(self)
        other._move(self.frames + ROOM)
        return other

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys, values: (COPIES, new frames, inner) to those of earlier frames; return all of them.
        They are overwritten by the next call unless `frames` has been advanced."""
        end = self.frames + keys.shape[1]
        if end > self._keys_values.shape[3]:
            self._move(end + ROOM)
        kept = self._keys_values[layer, :, :, :end]
        kept[0, :, self.frames :], kept[1, :, self.frames :] = keys, values
        return kept[0], kept[1]

    def _move(self, room: int) -> None:
        old = self._keys_values
        self._keys_values = old.new_empty(*old.shape[:3], room, old.shape[4])
        self._keys_values[:, :, :, : self.frames] = old[:, :, :, : self.frames]


class ChunkRun:
    """One run's access to an `EstimatorMemory`: reads its state and writes the next one; None: no memory.
    `start`: number of frames before those of the run."""

    def __init__(self, memory: EstimatorMemory | None, edge: int) -> None:
        """edge: number of preceding frames that a convolution reads."""
        self.edges: list[Tensor] = []
        self.start = memory.frames if memory else 0
        self._edge = edge
        self._memory = memory
        self._earlier = iter(memory.edges if memory else ())
        self._layer = 0

    def join(self, x: Tensor) -> Tensor:
        """x: (copies, edge + frames, channels) -> the same with its edge filled."""
        x[:, : self._edge] = next(self._earlier, 0)
        if self._memory is not None:
            self.edges.append(x[:, -self._edge :].clone())
        return x

    def all_keys(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(COPIES, frames, inner) -> including those of earlier frames."""
        if self._memory is None:
            return keys, values
        self._layer += 1
        return self._memory.append(self._layer - 1, keys, values)


class ChunkEstimator(ABC):
    """Integrates the velocity field of an estimator, which a subclass implements. Stateless: instances may be
    shared by threads."""

    def __init__(
        self, steps: Sequence[tuple[float, float]], guidance: float, layers: int, inner: int, edge: int
    ) -> None:
        """steps: t and dt of each Euler step; guidance: strength of classifier-free guidance; layers: number
        of attention layers; inner: channels of a key; edge: see ChunkRun."""
        self._lengths = [dt for _, dt in steps]
        self._guidance = guidance
        self._layers = len(self._lengths) * layers
        self._inner = inner
        self._edge = edge

    @abstractmethod
    def _field(self, given: Tensor, run: ChunkRun) -> Callable[[int, Tensor], Tensor]:
        """Return the velocity field for `given` (see `__call__`): a function of the index of the step and the
        state (frames, mels) that returns (COPIES, frames, mels). It is called once for each step, in order.
        """

    @property
    def frame_bytes(self) -> int:
        """Memory per frame in bytes."""
        return self._layers * 2 * COPIES * self._inner * torch.float32.itemsize

    def memory(self) -> EstimatorMemory:
        """Return the memory at the start of a sequence."""
        return EstimatorMemory(self._layers, self._inner)

    def __call__(
        self, noise: Tensor, given: Tensor, memory: EstimatorMemory | None = None, commit: bool = False
    ) -> Tensor:
        """noise: (frames, mels); given: (frames, 3 mels), encoder output, speaker and prompt mel; memory:
        state of the earlier frames, None: there are none. Returns mel (frames, mels). Each frame attends to
        everything up to the last of these. `commit`: add these frames to the memory."""
        run = ChunkRun(memory, self._edge)
        velocity = self._field(given, run)
        x = noise
        for step, dt in enumerate(self._lengths):
            conditioned, unconditioned = velocity(step, x)
            x = x + dt * ((1 + self._guidance) * conditioned - self._guidance * unconditioned)
        if commit and memory is not None:
            memory.edges, memory.frames = run.edges, memory.frames + len(noise)
        return x
