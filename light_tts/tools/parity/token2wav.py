"""Speech tokens to waveform: both chunk schedules of a stream, and one-chunk parts at several speeds, without
noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from light_tts.common.prompt_features import PromptFeatures
from light_tts.engine.speech.chunk_planner import Chunk, ChunkPlanner
from light_tts.engine.speech.faded_vocoding import OVERLAP_FRAMES
from light_tts.engine.speech.token2wav import Token2Wav
from light_tts.engine.speech.work_item import SpeechState, Voice, WorkItem
from light_tts.models.family import load_family
from light_tts.models.flow_options import FlowOptions
from light_tts.tools.parity import Check, Comparison, Golden

FILE = "token2wav.npz"
MEMORY = 1 << 28  # bytes for the flow's cached state
GROWN = 4  # the official schedule grows its chunks to this multiple of the first


def load(golden: Golden, full_last_chunk: bool, n_timesteps: int | None = None) -> Token2Wav:
    """Return the same configuration as a server on a CPU (`n_timesteps`: Euler steps of the flow, if not
    those of the checkpoint)."""
    family, device = load_family(golden.checkpoint), torch.device("cpu")
    flow = family.load_flow(device, torch.float32, FlowOptions(memory=MEMORY, n_timesteps=n_timesteps))()
    vocoder = family.load_vocoder(device, OVERLAP_FRAMES)()
    return Token2Wav(flow, vocoder, family.numbers, full_last_chunk, device)


def golden_voice(golden: Golden, prompt: bool = True) -> Voice:
    arrays = golden.arrays(FILE)
    tokens, mel = arrays["prompt_token"][0], arrays["prompt_feat"][0]
    features = PromptFeatures(
        tokens if prompt else tokens[:0], mel if prompt else mel[:0], arrays["embedding"].flatten()
    )
    return Voice.of(features, "cpu")


def stream(model: Token2Wav, voice: Voice, tokens: list[int], planner: ChunkPlanner) -> list[np.ndarray]:
    state = SpeechState(voice, seed=None)
    waves = []
    while chunk := planner.next_chunk(len(tokens), finished=True):
        waves += model.speak([WorkItem(state, tokens, chunk, stream=True)])
    return waves


def _streamed(golden: Golden, schedule: str, growth: int, full_last_chunk: bool) -> Iterator[Comparison]:
    arrays, numbers = golden.arrays(FILE), load_family(golden.checkpoint).numbers
    voice = golden_voice(golden)
    hop, lookahead = numbers.chunk_tokens, numbers.lookahead_tokens
    planner = ChunkPlanner(len(voice.speech_token), hop, lookahead, growth * hop)
    waves = stream(load(golden, full_last_chunk), voice, arrays["token"].tolist(), planner)
    yield Comparison(f"{schedule}.samples", [len(wave) for wave in waves], arrays[f"{schedule}_meta"][:, 3])
    expected = arrays.get(f"{schedule}_wav")
    if expected is not None:
        got = np.concatenate(waves)[None]
        yield Comparison(schedule, got, expected, 1e-2)
        yield Comparison(f"{schedule}.mean", np.abs(got - expected).mean(), 0.0, 1e-3)


def fixed_hop(golden: Golden) -> Iterator[Comparison]:
    yield from _streamed(golden, "fixed_hop", 1, full_last_chunk=False)


def grow_hop(golden: Golden) -> Iterator[Comparison]:
    yield from _streamed(golden, "grow_hop", GROWN, full_last_chunk=True)


def one_chunk(golden: Golden) -> Iterator[Comparison]:
    arrays, model = golden.arrays(FILE), load(golden, full_last_chunk=False)
    per_token = load_family(golden.checkpoint).numbers.samples_per_token
    for name, speed, prompt in (
        ("nonstream", 1.0, True),
        ("speed1p25", 1.25, True),
        ("speed0p8", 0.8, True),
        ("short9", 1.0, True),
        ("noprompt30", 1.0, False),
    ):
        expected = arrays.get(f"{name}_wav")
        if expected is None:  # the goldens of CosyVoice3 have fewer
            continue
        # the number of frames was rounded down
        count = math.ceil(expected.shape[1] * speed / per_token - 1e-6)
        state = SpeechState(golden_voice(golden, prompt), seed=None, speed=speed)
        item = WorkItem(state, arrays["token"][:count].tolist(), Chunk(0, count, count, True), stream=False)
        yield Comparison(name, model.speak([item])[0][None], expected, 1e-2)


CHECKS: list[Check] = [fixed_hop, grow_hop, one_chunk]
