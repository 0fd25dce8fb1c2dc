"""A diffusion transformer at the fixed times of the Euler steps: what depends only on the time is computed
once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.models.flow.chunk_estimator import ChunkRun
from light_tts.models.flow.dit.estimator import DiT, Modulation, Rotation, modulated


@dataclass(frozen=True)
class TimedDiT:
    """of_x, of_given: weights of the input layer for the state, and for encoder output, speaker and prompt
    mel side by side; blocks: (steps, blocks, 6, width), see Modulation; final: (steps, 2, width), scale and
    shift."""

    estimator: DiT
    of_x: Tensor
    of_given: Tensor
    blocks: Tensor
    final: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, estimator: DiT, times: Sequence[float]) -> TimedDiT:
        """times: in [0, 1], of each step."""
        weight = estimator.input_embed.proj.weight
        x, cond, mu, speaker = weight.chunk(4, dim=1)
        embedded = estimator.time_embed(torch.tensor(times, device=weight.device)).split(1)
        blocks, final = [], []
        for time in embedded:
            modulations = [torch.cat(block.attn_norm(time), dim=1) for block in estimator.transformer_blocks]
            blocks.append(torch.cat(modulations))
            final.append(torch.cat(estimator.norm_out(time), dim=1))
        given = torch.cat([mu, speaker, cond], dim=1)
        return cls(estimator, x.contiguous(), given, torch.stack(blocks), torch.cat(final))

    def entered(self, given: Tensor) -> Tensor:
        """given: (..., frames, 3 mels) -> its part of the transformer's input for both copies, the second of
        which is not conditioned: (2, ..., frames, width)"""
        conditioned = F.linear(given, self.of_given)
        both = torch.stack([conditioned, torch.zeros_like(conditioned)])
        return both + self.estimator.input_embed.proj.bias

    def velocity(
        self,
        x: Tensor,
        entered: Tensor,
        blocks: Tensor,
        final: Tensor,
        rotation: Rotation,
        run: ChunkRun,
    ) -> Tensor:
        """Return the velocity of both copies of each item, (2 * items, frames, mels). x: (items, frames,
        mels), the state; entered: (2, items, frames, width); blocks: (blocks, 6, width) and final: (2, width)
        of the step; run: has what the frames before these left."""
        h = (entered + F.linear(x, self.of_x)).flatten(0, 1)
        h = h + self.estimator.input_embed.conv_pos_embed(h, run)
        for block, modulation in zip(self.estimator.transformer_blocks, blocks, strict=True):
            h = block(h, Modulation(*modulation), rotation, None, run)
        return self.estimator.proj_out(modulated(h, *final))
