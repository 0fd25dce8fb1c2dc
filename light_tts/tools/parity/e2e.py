"""End to end: recording and texts -> speech tokens -> waveform, without noise and with greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from light_tts.common.audio import read_audio
from light_tts.common.prompt_features import PromptFeatures
from light_tts.engine.llm.one_shot import OneShot
from light_tts.engine.llm.sequence import PartRequest
from light_tts.engine.speech.chunk_planner import Chunk
from light_tts.engine.speech.token2wav import to_pcm16
from light_tts.engine.speech.work_item import SpeechState, Voice, WorkItem
from light_tts.models.frontend.frontend import Frontend
from light_tts.tools.parity import Check, Comparison, Golden
from light_tts.tools.parity.llm import finish, load_engine, load_model
from light_tts.tools.parity.token2wav import load as load_token2wav

FILE = "e2e.npz"
CPU = torch.device("cpu")


def recording_and_texts_to_wave(golden: Golden) -> Iterator[Comparison]:
    expected = golden.arrays(FILE)
    frontend = Frontend(golden.checkpoint, golden.config)
    features = frontend.features(*read_audio(golden.path("prompt.wav").read_bytes(), 0.0, 30.0))
    prompt = frontend.prompt_text(str(expected["prompt_text"]))
    text_ids = [i for piece in frontend.split_text(str(expected["text"])) for i in piece]
    yield Comparison("prompt_text_ids", prompt.ids, expected["prompt_text_ids"])
    yield Comparison("text_ids", text_ids, expected["text_ids"])
    tokens = _most_probable_tokens(golden, prompt.ids, text_ids, features, len(expected["speech_tokens"]))
    yield Comparison("speech_tokens", tokens, expected["speech_tokens"])
    wave = _speak(golden, tokens, features)[None]
    yield Comparison("wav", wave, expected["wav"], 1e-2)
    yield Comparison("pcm16", to_pcm16(wave), expected["pcm16"], 400)


def _most_probable_tokens(
    golden: Golden, prompt_text: list[int], text: list[int], voice: PromptFeatures, count: int
) -> list[int]:
    model = load_model(golden)
    limit = model.backbone.max_position_embeddings
    speech = voice.speech_token.tolist()
    part = PartRequest("e2e", 0, 0, model.ids, limit, prompt_text, speech, max_outputs=count)
    sequence = OneShot(part, text)
    return finish(load_engine(golden, slots=len(sequence.inputs) + count), sequence)


def _speak(golden: Golden, tokens: list[int], features: PromptFeatures) -> np.ndarray:
    model = load_token2wav(golden, full_last_chunk=False)
    state = SpeechState(Voice.of(features, CPU), seed=None)
    whole = Chunk(0, len(tokens), len(tokens), final=True)
    return model.speak([WorkItem(state, tokens, whole, stream=False)])[0]


CHECKS: list[Check] = [recording_and_texts_to_wave]
