"""The diffusion transformer on a CPU: the Euler steps over the next frames of one sequence, with cached state
for the earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from light_tts.models.flow.chunk_estimator import ChunkEstimator, ChunkRun
from light_tts.models.flow.dit.estimator import KERNEL, DiT
from light_tts.models.flow.dit.timed import TimedDiT


class DiTChunkEstimator(ChunkEstimator):
    """See `ChunkEstimator`."""

    def __init__(self, estimator: DiT, steps: Sequence[tuple[float, float]], guidance: float) -> None:
        blocks = estimator.transformer_blocks
        super().__init__(steps, guidance, len(blocks), blocks[0].attn.to_k.out_features, KERNEL - 1)
        self._timed = TimedDiT.of(estimator, [t for t, _ in steps])

    def _field(self, given: Tensor, run: ChunkRun) -> Callable[[int, Tensor], Tensor]:
        timed = self._timed
        entered = timed.entered(given[None])
        rotation = timed.estimator.rotary_embed(run.start, run.start + len(given))

        def velocity(step: int, x: Tensor) -> Tensor:
            return timed.velocity(x[None], entered, timed.blocks[step], timed.final[step], rotation, run)

        return velocity
