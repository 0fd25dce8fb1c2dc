"""The packed flow on a machine without a GPU: the references stand in for the kernels, which the interpreter
runs too slowly for a whole flow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from light_tts.kernels.flow import (
    euler_step,
    fill_rows,
    grouped_conv,
    layer_norm_linear,
    modulated_norm,
    packed_attention,
    packed_conv,
    packed_linear,
    relative_attention,
    repeat_rows,
    resnet_block,
    row_norm,
    shifted_linear,
    transformer_block,
)
from light_tts.models.checkpoint.cosyvoice2_config import Config
from light_tts.models.flow import backend, packed_encoder, packed_lookahead
from light_tts.models.flow import packed as packed_flow
from light_tts.models.flow.dit import packed as packed_dit
from light_tts.models.flow.dit import packed_encoder as packed_dit_encoder
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.pack import pack
from light_tts.models.flow.packed import share
from light_tts.models.flow.unet import packed
from light_tts.models.flow_options import FlowOptions


def references_for_kernels(patch: pytest.MonkeyPatch) -> None:
    for module in (packed, packed_dit):
        patch.setattr(module, "flow_step", euler_step.flow_step_reference)
        patch.setattr(module, "packed_attention", packed_attention.packed_attention_reference)
    for module in (packed, packed_encoder, packed_dit):
        patch.setattr(module, "packed_linear", packed_linear.packed_linear_reference)
        patch.setattr(module, "packed_linear_add_", packed_linear.packed_linear_add_reference_)
    for module in (packed, packed_encoder):
        patch.setattr(module, "layer_norm_linear", layer_norm_linear.layer_norm_linear_reference)
    patch.setattr(packed_encoder, "relative_attention", relative_attention.relative_attention_reference)
    patch.setattr(packed_encoder, "row_norm", row_norm.row_norm_reference)
    for module in (packed_encoder, packed_lookahead):
        patch.setattr(module, "shifted_linear", shifted_linear.shifted_linear_reference)
    patch.setattr(packed_flow, "fill_rows", fill_rows.fill_rows_reference)
    patch.setattr(packed_dit, "grouped_conv", grouped_conv.grouped_conv_reference)
    patch.setattr(packed_dit, "modulated_norm", modulated_norm.modulated_norm_reference)
    patch.setattr(packed_dit_encoder, "repeat_rows", repeat_rows.repeat_rows_reference)
    patch.setattr(packed, "packed_conv", packed_conv.packed_conv_reference)
    patch.setattr(packed, "transformer_block", transformer_block.transformer_block_reference)
    patch.setattr(packed, "resnet_block", resnet_block.resnet_block_reference)


def blocks_in_one_kernel(patch: pytest.MonkeyPatch, rows: int = 4096, resnets: bool = True) -> None:
    """Up to this number of rows, a transformer block is computed by the reference for its one kernel, in any
    dtype and size; `resnets`: also a residual block."""
    patch.setattr(packed, "transformer_block", transformer_block.transformer_block_reference)
    patch.setattr(packed, "resnet_block", resnet_block.resnet_block_reference)

    def rows_of_tile(estimator: packed.PackedEstimator, size: int) -> int | None:
        return 16 if size <= rows else None

    patch.setattr(packed.PackedEstimator, "rows_of_tile", rows_of_tile)
    if resnets:
        patch.setattr(packed.PackedEstimator, "rows_of_resnet_tile", rows_of_tile)


@contextlib.contextmanager
def kernels_or_references(device: torch.device) -> Iterator[None]:
    """In it, the packed flow runs on this device."""
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            references_for_kernels(patch)
        yield


def packed_stage(patch: pytest.MonkeyPatch) -> None:
    """Decode stages in threads of this process use the packed flow."""

    def choose(
        model_dir: Path,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        options: FlowOptions,
        ended: Callable[[str], None],
    ) -> object:
        flow = Flow.from_checkpoint(model_dir, config, device)
        items, room, automatic = options.max_batch_size, options.gpu_memory, options.gpu_memory_is_automatic
        return share(flow, *pack(flow, dtype), items, room, automatic, ended)

    references_for_kernels(patch)
    patch.setattr(backend, "choose_flow", choose)
