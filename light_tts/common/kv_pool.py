"""The KV cache: one preallocated pool of token slots per layer, and the table from positions to slots.

A slot holds K and V of one token. Slots are allocated one by one, so that a request holds exactly as many as
it has tokens, and are freed together.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from light_tts.common.transfer import upload

Slots = Tensor | slice
"""Indices of slots: (tokens,) int64, or a slice of consecutive ones, which are read without a copy."""

LayerPool = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""One layer as kernels take it: k, v (slots, kv_heads, head_dim), k_scale, v_scale (slots, kv_heads), which
are there with int8 only."""


class KVPool:
    """K and V of `slots` tokens in each layer. With `int8` they are stored as int8 with one scale per token
    and head; `read` converts back to `dtype`. The memory is reserved here; on the CPU it is only committed
    when written."""

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        int8: bool = False,
    ) -> None:
        shape = (layers, slots, kv_heads, head_dim)
        self.int8 = int8
        self.dtype = dtype
        stored = torch.int8 if int8 else dtype
        self.k = torch.empty(shape, dtype=stored, device=device)
        self.v = torch.empty(shape, dtype=stored, device=device)
        self.k_scale = torch.empty(shape[:3] if int8 else 0, dtype=dtype, device=device)
        self.v_scale = torch.empty_like(self.k_scale)

    def write(self, layer: int, slots: Slots, k: Tensor, v: Tensor) -> None:
        """Store K and V of these slots. k, v: (tokens, kv_heads, head_dim)"""
        if self.int8:
            k, self.k_scale[layer, slots] = quantize(k)
            v, self.v_scale[layer, slots] = quantize(v)
        self.k[layer, slots] = k
        self.v[layer, slots] = v

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return k, v: (tokens, kv_heads, head_dim) of `dtype` of these slots. May be views of the pool."""
        k, v = self.k[layer], self.v[layer]
        if isinstance(slots, slice):
            k, v = k[slots], v[slots]
        else:
            k, v = k.index_select(0, slots), v.index_select(0, slots)
        if self.int8:
            k = k.to(self.dtype) * self.k_scale[layer, slots, :, None]
            v = v.to(self.dtype) * self.v_scale[layer, slots, :, None]
        return k, v

    def layers(self) -> list[LayerPool]:
        """Return views of each layer, as the kernels take them."""
        scales = zip(self.k_scale, self.v_scale, strict=True) if self.int8 else [(None, None)] * len(self.k)
        return [(k, v, *scale) for k, v, scale in zip(self.k, self.v, scales, strict=True)]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x: (tokens, heads, head_dim) to int8 of the same shape and scale (tokens, heads). Their
    product differs from x by at most half a scale."""
    scale = (x.abs().amax(-1) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


class SlotTable:
    """The slot of each position of each request. A request is a row, allocated with `open` and freed with
    `close`, together with all its slots.

    The table is kept in host memory (`slots_of`) and on the device (`device_slots`: (rows, max_len) int32,
    read by kernels). On the CPU both are the same memory; otherwise what `extend` adds must be written to the
    device, for example by `upload`.
    """

    def __init__(self, slots: int, rows: int, max_len: int, device: torch.device) -> None:
        self._table = np.zeros((rows, max_len), dtype=np.int32)
        self._lengths = [0] * rows
        self._free_rows = list(range(rows))[::-1]
        self._free = np.arange(slots, dtype=np.int32)[::-1].copy()  # a stack whose top is at `self.free`
        self.free = slots
        self._untouched = slots  # of the stack, from its bottom, since all slots were free
        self.device_slots = torch.from_numpy(self._table).to(device)
        self._mirrored = device.type != "cpu"

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    def open(self) -> int:
        """Return a row for a request without tokens. Raises IndexError if none is left."""
        return self._free_rows.pop()

    def extend(self, row: int, tokens: int) -> None:
        """Allocate slots for the next `tokens` positions of the request. Raises IndexError, without any
        change, if there are not enough slots or positions."""
        start = self._lengths[row]
        if tokens > self.free or start + tokens > self._table.shape[1]:
            raise IndexError(
                f"{tokens} more KV slots for a request of {start}: {self.free} are free, "
                f"and a request has at most {self._table.shape[1]}"
            )
        taken = self._free[self.free - tokens : self.free][::-1]
        self.free -= tokens
        self._untouched = min(self._untouched, self.free)
        self._table[row, start : start + tokens] = taken
        self._lengths[row] = start + tokens

    def upload(self, pieces: Iterable[tuple[int, int, int]]) -> None:
        """Update the device's table at (row, first position, end) in one asynchronous copy. Work queued
        earlier still sees the old table."""
        if not self._mirrored:
            return
        max_len = self._table.shape[1]
        places = np.concatenate([np.arange(start, end) + row * max_len for row, start, end in pieces])
        changes = upload(np.stack([places, self._table.reshape(-1)[places]]), self.device_slots.device)
        self.device_slots.view(-1).index_copy_(0, changes[0], changes[1].int())

    def truncate(self, row: int, length: int) -> None:
        """Free the slots of all positions from `length` on."""
        end = self._lengths[row]
        returned = self._table[row, length:end]
        self._free[self.free : self.free + len(returned)] = returned[::-1]
        self.free += len(returned)
        self._lengths[row] = length
        if self.free == len(self._free):  # in order again, so that a request alone has consecutive slots
            self._free[self._untouched :] = np.arange(self.free - self._untouched)[::-1]
            self._untouched = self.free

    def close(self, row: int) -> None:
        self.truncate(row, 0)
        self._free_rows.append(row)

    def length(self, row: int) -> int:
        return self._lengths[row]

    def index(self, row: int, start: int, end: int) -> Slots:
        """Return the slots of the positions [start, end) of the request on the device."""
        slots = self._table[row, start:end]
        first = int(slots[0])
        if np.array_equal(slots, np.arange(first, first + len(slots))):
            return slice(first, first + len(slots))
        return self.device_slots[row, start:end].long()

    def slots_of(self, row: int) -> np.ndarray:
        """Return a view of the slots of the request's positions in order: (length,) int32."""
        return self._table[row, : self._lengths[row]]
