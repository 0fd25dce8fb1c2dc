"""Conditional flow matching: integrates fixed noise to a mel spectrogram in a few Euler steps with
classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from light_tts.models.checkpoint.config import MAX_FRAMES, CommonFlowConfig
from light_tts.models.flow.estimator_backend import EstimatorBackend, TorchEstimator
from light_tts.models.flow.masks import EstimatorMasks

EstimatorT = TypeVar("EstimatorT", bound=nn.Module)


@cache
def fixed_noise(channels: int, device: torch.device) -> Tensor:
    """Return (1, channels, MAX_FRAMES) float32: the start of every integration, so that equal inputs sound
    the same. Generated on the CPU, whose generator is the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, MAX_FRAMES, generator=generator).to(device)


def time_steps(count: int) -> Tensor:
    """Return (count + 1,) float32: 1 - cos(pi/2 * k/count), small steps first."""
    return 1 - torch.cos(torch.linspace(0, 1, count + 1) * 0.5 * math.pi)


class ConditionalFlowMatching(nn.Module, Generic[EstimatorT]):
    """`estimator`: the velocity field, see EstimatorBackend; `chunk_size`: attention chunk in streaming mode,
    in mel frames."""

    def __init__(self, config: CommonFlowConfig, estimator: EstimatorT, chunk_size: int) -> None:
        super().__init__()
        self.guidance = config.inference_cfg_rate
        self._timesteps = config.n_timesteps
        self.chunk_size = chunk_size
        self.estimator = estimator
        self.backend: EstimatorBackend = TorchEstimator(self.estimator)

    @property
    def steps(self) -> list[tuple[float, float]]:
        """t and dt of each Euler step."""
        return euler_steps(self._timesteps)

    def forward(self, mu: Tensor, lengths: Tensor, spks: Tensor, cond: Tensor, streaming: bool) -> Tensor:
        """mu: (B, 80, T) encoder output, lengths: (B,) frames, spks: (B, 80), cond: (B, 80, T) mel of the
        prompt, zero after it. Returns mel (B, 80, T). Raises ValueError above MAX_FRAMES frames."""
        frames = mu.shape[2]
        if frames > MAX_FRAMES:
            raise ValueError(f"{frames} mel frames of prompt and speech exceed {MAX_FRAMES}")
        x = fixed_noise(mu.shape[1], mu.device)[:, :, :frames].to(mu.dtype).repeat(len(mu), 1, 1)
        masks = EstimatorMasks.build(
            lengths, frames, self.chunk_size if streaming else None, mu.dtype, copies=2
        )
        return self.integrate(x, self.steps, masks, mu, spks, cond)

    def integrate(
        self,
        x: Tensor,
        steps: Sequence[tuple[float, float]],
        masks: EstimatorMasks,
        mu: Tensor,
        spks: Tensor,
        cond: Tensor,
    ) -> Tensor:
        """Integrate from x over `steps` (t, dt). masks: for two copies of the batch; the rest as in
        `forward`. Returns (B, 80, T)."""
        # The first half of the batch is conditioned, the second half is not.
        mu, spks, cond = (torch.cat([value, torch.zeros_like(value)]) for value in (mu, spks, cond))
        for t, dt in steps:
            # float32, because it is multiplied to angles of up to 1000 t
            time = torch.full((len(mu),), t, device=mu.device)
            velocity = self.backend(torch.cat([x, x]), masks, mu, time, spks, cond)
            conditioned, unconditioned = velocity.chunk(2)
            x = x + dt * ((1 + self.guidance) * conditioned - self.guidance * unconditioned)
        return x


@cache
def euler_steps(count: int) -> list[tuple[float, float]]:
    """Return (t, dt) of each of `count` steps. t is the float32 sum of the steps so far, which the models
    were tuned with."""
    span = time_steps(count)
    steps, t = [], span[0]
    for following in span[1:]:
        dt = following - t
        steps.append((t.item(), dt.item()))
        t = t + dt
    return steps
