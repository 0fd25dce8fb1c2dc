"""Everything before the LLM: prompt features, tokenizer, text normalisation."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator

import numpy as np

from light_tts.common.audio import read_audio, resample
from light_tts.models.frontend.features import SPEECH_RATE, flow_mel, kaldi_fbank, whisper_log_mel
from light_tts.models.frontend.frontend import Frontend
from light_tts.models.frontend.speech_tokenizer import OnnxSpeechTokenizer
from light_tts.models.frontend.spellers import Spell
from light_tts.models.frontend.text import TextNormalizer
from light_tts.models.frontend.tokenizer import TextTokenizer
from light_tts.tools.parity import Check, Comparison, Golden

FILE = "frontend.npz"
FAINT = -10.0  # logarithm of a magnitude
BORDER_FRAMES = 2  # mel frames whose windows extend beyond the end of a signal
WETEXT_VERSION = "0.1.8"  # the version that produced the normalised texts in the goldens


def prompt(golden: Golden) -> Iterator[Comparison]:
    expected = golden.arrays(FILE)
    samples, rate = read_audio(golden.path("prompt.wav").read_bytes(), 0.0, 30.0)
    frontend = Frontend(golden.checkpoint, golden.config)
    features = frontend.features(samples, rate)
    mel = flow_mel(resample(samples, rate, golden.config.sample_rate), golden.config.mel)
    yield from mels_agree("mel", mel, expected["mel24"][0])
    yield Comparison("aligned_token", features.speech_token, expected["aligned_token"][0])
    yield from mels_agree("aligned_feat", features.mel, expected["aligned_feat"][0])
    yield Comparison("embedding", features.embedding, expected["embedding"][0], 1e-3)
    speech = resample(samples, rate, SPEECH_RATE)
    tokens = OnnxSpeechTokenizer(golden.checkpoint, golden.config.inputs.speech_tokenizer)(speech)
    yield Comparison("speech_token", tokens, expected["speech_token_raw"][0])
    if "wav16" in expected:
        yield Comparison("resample.16k", speech, expected["wav16"][0], 1e-6)
        yield Comparison("whisper_log_mel", whisper_log_mel(speech), expected["whisper_logmel"][0], 1e-4)
        yield Comparison("kaldi_fbank", kaldi_fbank(speech), expected["fbank_mean_norm"], 2e-3)
    if "wav24_from16_first24000" in expected:
        again = resample(speech, SPEECH_RATE, golden.config.sample_rate)
        start = expected["wav24_from16_first24000"][0]
        yield Comparison("resample.16k_to_24k", again[: len(start)], start, 1e-6)
        mel, mels = expected["mel24_from16"][0], golden.config.mel
        # frames that do not depend on anything after `start`
        exact = len(start) // mels.hop_size - BORDER_FRAMES
        yield Comparison("mel.16k_to_24k.given", flow_mel(start, mels)[:exact], mel[:exact], 1e-4)
        # In the chain, rounding of the samples matters: there is no energy above 8 kHz and in pauses, and
        # where the magnitude is near the floor of 3e-5, one unit in the last place of the samples (6e-8)
        # changes its logarithm by up to 5e-3.
        yield Comparison("mel.16k_to_24k", flow_mel(again, mels), mel, 5e-3)


def mels_agree(stage: str, got: np.ndarray, expected: np.ndarray) -> Iterator[Comparison]:
    """Compare logarithms of magnitudes. The golden ones were computed in float32: by float64, their rounding
    changes those that are faint, just above the floor of 3e-5, by up to 8e-4, and all others by up to 6e-5.
    """
    faint = expected < FAINT
    if got.shape == expected.shape:
        yield Comparison(f"{stage}.faint", got[faint], expected[faint], 1e-3)
        got, expected = got[~faint], expected[~faint]
    yield Comparison(stage, got, expected, 1e-4)


def tokenizer(golden: Golden) -> Iterator[Comparison]:
    expected = golden.arrays("tokenizer.npz")
    tokens = TextTokenizer(golden.checkpoint, golden.config.inputs.special_tokens)
    yield Comparison("vocab_len", len(tokens), int(expected["vocab_len"]))
    yield Comparison("eos_token_id", tokens.eos_token_id, int(expected["eos_token_id"]))
    special = [tokens.token_id(str(token)) for token in expected["special_tokens"]]
    yield Comparison("special_ids", special, expected["special_ids"])
    for i, text in enumerate(expected["texts"]):
        yield Comparison(f"text_{i}", tokens.encode(str(text)), expected[f"ids_{i}"])


def text(golden: Golden) -> Iterator[Comparison]:
    expected = json.loads(golden.path("text_normalize.json").read_text(encoding="utf-8"))
    inputs = golden.config.inputs
    tokens = TextTokenizer(golden.checkpoint, inputs.special_tokens)

    def normalizer(spellers: dict[str, Spell] | None) -> TextNormalizer:
        return TextNormalizer(lambda text: len(tokens.encode(text)), spellers, kept=inputs.kept_tokens)

    backends = {"cases_no_tn": normalizer({})}
    if _wetext_version() == WETEXT_VERSION:
        backends["cases"] = normalizer(None)
    for name, backend in backends.items():
        for i, case in enumerate(expected.get(name, [])):
            yield Comparison(f"{name}_{i}.split", backend.split(case["text"]), case["split"])
            yield Comparison(f"{name}_{i}.whole", backend.normalize(case["text"]), case["nosplit"])


def _wetext_version() -> str:
    try:
        return importlib.metadata.version("wetext")
    except importlib.metadata.PackageNotFoundError:
        return ""


CHECKS: list[Check] = [prompt, tokenizer, text]
