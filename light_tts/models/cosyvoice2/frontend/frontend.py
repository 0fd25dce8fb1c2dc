"""From what a client sends (texts, a recording or the name of a voice) to what the models take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from light_tts.common.audio import resample
from light_tts.common.prompt_features import PromptFeatures
from light_tts.models.cosyvoice2.config import Config
from light_tts.models.cosyvoice2.frontend.features import SPEECH_RATE, flow_mel
from light_tts.models.cosyvoice2.frontend.speaker import SpeakerEncoder, load_speakers
from light_tts.models.cosyvoice2.frontend.speech_tokenizer import SpeechTokenizer
from light_tts.models.cosyvoice2.frontend.text import TextNormalizer
from light_tts.models.cosyvoice2.frontend.tokenizer import END_OF_PROMPT, TextTokenizer


@dataclass(frozen=True)
class LLMPrompt:
    """What the LLM gets besides the text: `text_ids` before it, `speech_token` (n,) int32 after it."""

    text_ids: list[int]
    speech_token: np.ndarray


_NO_TOKENS = np.zeros(0, np.int32)


class Frontend:
    """All of a checkpoint that runs before the LLM. Thread-safe."""

    def __init__(self, model_dir: Path, config: Config) -> None:
        """Raises CheckpointError naming the file that is missing or damaged."""
        self._config = config
        self.tokenizer = TextTokenizer(model_dir)
        self.normalizer = TextNormalizer(lambda text: len(self.tokenizer.encode(text)))
        self._speech_tokenizer = SpeechTokenizer(model_dir)
        self._speaker_encoder = SpeakerEncoder(model_dir)
        self.speakers = load_speakers(model_dir, config)

    def split_text(self, text: str) -> list[list[int]]:
        """The pieces of a text to speak, normalised, as ids; empty if there is nothing to say."""
        pieces = [self.tokenizer.encode(piece) for piece in self.normalizer.split(text)]
        return [ids for ids in pieces if ids]

    def text_ids(self, text: str) -> list[int]:
        """Ids of a piece of text as it is (text that arrives while it is spoken)."""
        return self.tokenizer.encode(text)

    def features(self, samples: np.ndarray, rate: int) -> PromptFeatures:
        """Features of a recording (n,) float32 at `rate` Hz: each from the recording itself, not from one
        resampled for another. Tokens and mel are cut to the same duration."""
        speech = resample(samples, rate, SPEECH_RATE)
        tokens = self._speech_tokenizer(speech)
        mel = flow_mel(resample(samples, rate, self._config.sample_rate), self._config.mel)
        ratio = self._config.token_mel_ratio
        length = min(len(mel) // ratio, len(tokens))
        return PromptFeatures(tokens[:length], mel[: ratio * length], self._speaker_encoder(speech))

    def speaker_features(self, speaker: str) -> PromptFeatures:
        """Features of a voice stored in the checkpoint. Raises KeyError."""
        return self.speakers[speaker].features

    def llm_prompt(self, text: str, features: PromptFeatures) -> LLMPrompt:
        """The mode follows from the prompt text: an instruction if it ends with <|endofprompt|> (the voice is
        then for the flow only), cross-lingual if it is empty (likewise), else what the recording says."""
        if text.endswith(END_OF_PROMPT):
            return LLMPrompt(self.tokenizer.encode(text), _NO_TOKENS)
        if not text.strip():
            return LLMPrompt([], _NO_TOKENS)
        return LLMPrompt(self.tokenizer.encode(self.normalizer.normalize(text)), features.speech_token)

    def speaker_llm_prompt(self, text: str, speaker: str) -> LLMPrompt:
        """The same for a stored voice, with its own transcript: `text` counts as an instruction only."""
        stored = self.speakers[speaker]
        if text.endswith(END_OF_PROMPT):
            return LLMPrompt(self.tokenizer.encode(text), _NO_TOKENS)
        return LLMPrompt(stored.prompt_text_ids, stored.llm_speech_token)
