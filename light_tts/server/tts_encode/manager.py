"""The encode process: turns texts into token ids and recordings into prompt features. Assembles and runs the
stage."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from light_tts.common.imports import importing
from light_tts.models.family import load_family
from light_tts.models.frontend.spellers import SpellerPool
from light_tts.server.core.stage import StageContext

MAX_SPELLER_PROCESSES = 4


def run(ctx: StageContext) -> None:
    """Entry point of the stage; returns on Shutdown."""
    with closing(SpellerPool(speller_processes())) as spelling:  # loads in parallel with what follows
        with importing():
            import torch

            from light_tts.server.tts_encode.jobs import STAGE
            from light_tts.server.tts_encode.stage import EncodeStage

        ctx.startup.end("imports")
        torch.set_num_threads(1)  # the pool's threads provide the parallelism
        family = load_family(ctx.settings.model_dir)
        numbers = family.numbers
        frontend = family.load_frontend(spelling.spellers, spelling.at_once)
        ctx.startup.end("models")
        threads = min(ctx.settings.encode_paral_num, len(os.sched_getaffinity(0)))
        pool = ThreadPoolExecutor(threads, thread_name_prefix=STAGE)
        # These threads mostly wait for their turn in the speller pool.
        texts = ThreadPoolExecutor(2 * ctx.settings.encode_paral_num, thread_name_prefix="texts")
        try:
            stage = EncodeStage(ctx, frontend, pool, texts)
            spelling.wait_until_ready()
            ctx.startup.end("text processing")
            ctx.ready(
                {
                    "speakers": sorted(frontend.speakers),
                    "chunk_seconds": numbers.chunk_tokens * numbers.samples_per_token / numbers.sample_rate,
                    "instructions": frontend.takes_instructions,
                    "device": "cpu",
                }
            )
            ctx.serve(stage)
            stage.close()
        finally:
            for executor in (pool, texts):
                executor.shutdown(wait=False, cancel_futures=True)


def speller_processes() -> int:
    """Return the number of speller processes, at least one: inside this process, a text being processed would
    block everything else."""
    return min(MAX_SPELLER_PROCESSES, max(1, len(os.sched_getaffinity(0)) // 4))
