"""The decode process: turns speech tokens into audio. Assembles and runs the stage."""

from __future__ import annotations

from light_tts.common.device import choose_device
from light_tts.engine.speech.chunk_planner import SHORTEST, largest_hop
from light_tts.engine.speech.faded_vocoding import OVERLAP_FRAMES
from light_tts.engine.speech.lanes import SpeechEngine
from light_tts.engine.speech.part_speech import ChunkRules
from light_tts.engine.speech.token2wav import Token2Wav
from light_tts.models.family import load_family
from light_tts.models.flow_options import FlowOptions
from light_tts.models.numbers import ModelNumbers
from light_tts.server.core import gpu_memory, host_memory
from light_tts.server.core.first_chunk_lock import choose_first_chunk_lock
from light_tts.server.core.settings import SettingsError
from light_tts.server.core.stage import StageContext
from light_tts.server.tts_decode.stage import DecodeStage
from light_tts.server.tts_decode.voices import Voices


def run(ctx: StageContext) -> None:
    """Entry point of the stage; returns on Shutdown."""
    settings = ctx.settings
    family = load_family(settings.model_dir)
    check_first_hop(family.numbers, settings.first_hop)
    device, dtype = choose_device(settings.device, settings.data_type, ctx.index)
    ctx.startup.end("GPU")
    new_flow = family.load_flow(
        device,
        dtype,
        FlowOptions(
            load_trt=settings.load_trt,
            max_batch_size=settings.decode_max_batch_size,
            memory=host_memory.flow_memory(settings),
            gpu_memory=gpu_memory.flow_memory(settings, device),
            gpu_memory_is_automatic=settings.flow_memory_gpu_mb == "auto",
            n_timesteps=settings.n_timesteps,
        ),
        ctx.startup.end,
    )
    new_vocoder = family.load_vocoder(device, OVERLAP_FRAMES)
    ctx.startup.end("vocoder weights")
    models = [
        Token2Wav(
            new_flow(),
            new_vocoder(),
            family.numbers,
            full_last_chunk=settings.full_last_chunk,
            device=device,
        )
        for _ in range(settings.decode_paral_num)
    ]
    engine = SpeechEngine(models, device, settings.decode_max_batch_size, wake=ctx.inbox.wake)
    first_chunk_lock = choose_first_chunk_lock(ctx.run_dir.root, device)
    rules = chunk_rules(family.numbers, engine.model, settings.chunks_grow, settings.first_hop)
    try:
        if engine.on_gpu:
            ctx.log.info("preparing the GPU: kernels are compiled once per machine, which can take minutes")
            engine.warm_up()
            ctx.startup.end("kernels and first graphs")
        stage = DecodeStage(ctx, engine, Voices(device), rules, first_chunk_lock)
        ctx.ready({"sample_rate": family.numbers.sample_rate, "device": str(device)})
        ctx.serve(stage)
    finally:
        engine.close()


def check_first_hop(numbers: ModelNumbers, first_hop: int | None) -> None:
    """Raise SettingsError if the first chunk would not be shorter than the others."""
    longest = numbers.chunk_tokens - SHORTEST
    if first_hop is not None and first_hop > longest:
        raise SettingsError(
            f"--first_hop {first_hop}: must be at most {longest} with this checkpoint, whose chunks have "
            f"{numbers.chunk_tokens} tokens"
        )


def chunk_rules(
    numbers: ModelNumbers, model: Token2Wav, grow: bool, first_hop: int | None = None
) -> ChunkRules:
    return ChunkRules(
        hop=numbers.chunk_tokens,
        max_hop=largest_hop(numbers.chunk_tokens, grow),
        lookahead=numbers.lookahead_tokens,
        vocabulary=numbers.spoken_ids,
        max_tokens=numbers.max_speech_tokens,
        samples_per_token=numbers.samples_per_token,
        held_back=model.held_back,
        replayed=model.replayed,
        first_hop=first_hop,
    )
