"""The LLM process of one style. Assembles and runs the stage."""

from __future__ import annotations

from light_tts.common.device import choose_device
from light_tts.common.sampling_rule import MAX_TOP_K, MAX_WIN_SIZE
from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.llm_yield import LLMYield
from light_tts.engine.llm.options import EngineOptions
from light_tts.engine.llm.pace import choose_pace
from light_tts.models.family import load_family
from light_tts.server.core.first_chunk_lock import choose_first_chunk_lock
from light_tts.server.core.stage import StageContext
from light_tts.server.core.styles import load_styles
from light_tts.server.tts_llm.gpu_turn import GpuTurn
from light_tts.server.tts_llm.parts import PartFactory
from light_tts.server.tts_llm.reading import Reading
from light_tts.server.tts_llm.stage import LLMStage


def run(ctx: StageContext) -> None:
    """Entry point of the stage; returns on Shutdown."""
    stage = load(ctx)
    ctx.ready({"device": stage.device, "word_times": stage.knows_word_times})
    ctx.serve(stage)


def load(ctx: StageContext) -> LLMStage:
    """Return the stage with its model loaded. Raises CheckpointError, ConfigError, StyleError or
    DeviceError.
    """
    settings = ctx.settings
    family = load_family(settings.model_dir)
    styles = load_styles(settings.model_dir)
    device, dtype = choose_device(settings.device, settings.data_type)
    ctx.startup.end("GPU")
    model = family.load_llm(styles[ctx.index].llm_path, device, dtype)
    ctx.startup.end("weights")
    pace = choose_pace(device, settings.router_max_wait_tokens)
    limit = min(settings.max_req_total_len, model.backbone.max_position_embeddings)
    engine = LLMEngine(
        model,
        EngineOptions(
            slots=settings.max_total_token_num,
            rows=settings.gpt_paral_num,
            max_len=limit,
            window=max(family.numbers.sampling.win_size, MAX_WIN_SIZE),
            max_top_k=max(family.numbers.sampling.top_k, MAX_TOP_K),
            int8=settings.int8_kv,
            round_steps=pace.round_steps,
            graph_max_batch=0 if settings.disable_cudagraph else settings.graph_max_batch_size,
            graph_max_len=settings.graph_max_len_in_batch,
        ),
    )
    ctx.startup.end("KV cache")
    engine.warm_up()
    ctx.startup.end("kernels and first graphs")
    gpu_turn = None
    if len(styles) > 1 and device.type == "cuda":
        gpu_turn = GpuTurn(ctx.run_dir.root, settings.gpt_paral_step_num, engine.synchronize)
    first_chunk_lock = choose_first_chunk_lock(ctx.run_dir.root, device)
    llm_yield = None if first_chunk_lock is None else LLMYield(first_chunk_lock.taken)
    parts = PartFactory(family.numbers, model.ids, settings, limit)
    aligner = family.load_aligner(model)
    reading = None
    if aligner is not None:
        reading = Reading(aligner, settings.redraw_misread, ctx.log)
    return LLMStage(ctx, engine, parts, gpu_turn, pace, llm_yield, reading)
