"""The diffusion transformer on a CPU: the Euler steps over the next frames of one sequence, with cached state
for the earlier ones. Values that depend only on the time, which takes ten fixed values, are computed once,
and values shared by all steps once per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.models.flow.chunk_estimator import ChunkEstimator, ChunkRun
from light_tts.models.flow.dit.estimator import KERNEL, DiT, Rotation, modulated


class DiTChunkEstimator(ChunkEstimator):
    """See `ChunkEstimator`."""

    def __init__(self, estimator: DiT, steps: Sequence[tuple[float, float]], guidance: float) -> None:
        blocks = estimator.transformer_blocks
        super().__init__(steps, guidance, len(blocks), blocks[0].attn.to_k.out_features, KERNEL - 1)
        self._dit = estimator
        x, cond, mu, speaker = estimator.input_embed.proj.weight.chunk(4, dim=1)
        self._of_x, self._of_given = x.contiguous(), torch.cat([mu, speaker, cond], dim=1)
        times = estimator.time_embed(torch.tensor([t for t, _ in steps])).split(1)
        self._modulations = [[block.attn_norm(time) for block in blocks] for time in times]
        self._final_modulations = [estimator.norm_out(time) for time in times]

    def _field(self, given: Tensor, run: ChunkRun) -> Callable[[int, Tensor], Tensor]:
        conditioned = F.linear(given, self._of_given)
        # The second copy is not conditioned.
        entered = torch.stack([conditioned, torch.zeros_like(conditioned)]) + self._dit.input_embed.proj.bias
        rotation = self._dit.rotary_embed(run.start, run.start + len(given))
        return lambda step, x: self._velocity(step, x, entered, rotation, run)

    def _velocity(self, step: int, x: Tensor, entered: Tensor, rotation: Rotation, run: ChunkRun) -> Tensor:
        """x: (frames, mels); entered: (COPIES, frames, width). Returns (COPIES, frames, mels)."""
        h = entered + F.linear(x, self._of_x)
        h = h + self._dit.input_embed.conv_pos_embed(h, run)
        for block, modulation in zip(self._dit.transformer_blocks, self._modulations[step], strict=True):
            h = block(h, modulation, rotation, None, run)
        return self._dit.proj_out(modulated(h, *self._final_modulations[step]))
