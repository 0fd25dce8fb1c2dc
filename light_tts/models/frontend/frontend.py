"""Converts a client's input (texts, a recording or the name of a voice) to the models' input."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from light_tts.common.audio import resample
from light_tts.common.prompt_features import PromptFeatures
from light_tts.models.checkpoint.config import CommonConfig
from light_tts.models.frontend.features import SPEECH_RATE, flow_mel
from light_tts.models.frontend.prompt_text import PromptText, PromptTexts
from light_tts.models.frontend.speaker import OnnxSpeakerEncoder, load_speakers
from light_tts.models.frontend.speech_tokenizer import OnnxSpeechTokenizer
from light_tts.models.frontend.spellers import Spell
from light_tts.models.frontend.text import TextNormalizer, Wanted, always
from light_tts.models.frontend.text_stream import TextStream
from light_tts.models.frontend.tokenizer import TextTokenizer

KEPT_ENCODINGS = 64


class Frontend:
    """All components of a checkpoint that run before the LLM. Thread-safe."""

    def __init__(
        self,
        model_dir: Path,
        config: CommonConfig,
        spellers: dict[str, Spell] | None = None,
        spelled_at_once: int = 1,
    ) -> None:
        """`spellers`, `spelled_at_once`: see TextNormalizer. Raises CheckpointError naming the file that is
        missing or damaged."""
        self._config = config
        inputs = config.inputs
        self.tokenizer = TextTokenizer(model_dir, inputs.special_tokens)
        # a text of one sentence is measured, and measured again as a piece, before its ids are taken
        self._encode = lru_cache(KEPT_ENCODINGS)(self.tokenizer.encode)
        self.normalizer = TextNormalizer(
            lambda text: len(self._encode(text)), spellers, spelled_at_once, inputs.kept_tokens
        )
        self._prompt_texts = PromptTexts(self.tokenizer, self.normalizer, inputs.system)
        self._speech_tokenizer = OnnxSpeechTokenizer(model_dir, inputs.speech_tokenizer)
        self._speaker_encoder = OnnxSpeakerEncoder(model_dir)
        self.speakers = load_speakers(model_dir, config)
        self.takes_instructions = config.instructions

    def split_text(self, text: str, wanted: Wanted = always) -> list[list[int]]:
        """Return the normalised pieces of a text as ids; empty if there is nothing to say. Raises Abandoned
        when the result is no longer wanted."""
        pieces = [self._encode(piece) for piece in self.normalizer.split(text, wanted)]
        return [list(ids) for ids in pieces if ids]

    def at_once(self, text: str, prompt_text: str) -> bool:
        """Whether `split_text` and `prompt_text` take well under a millisecond for these two."""
        return self._prompt_texts.at_once(prompt_text) and self.normalizer.at_once(text)

    def words(self, ids: list[int]) -> list[tuple[str, int]]:
        """Return the words of a piece from `split_text`, and the number of ids of each."""
        return self.tokenizer.words_of(ids)

    def text_stream(self) -> TextStream:
        """Return a stream for text that arrives while it is spoken. Not thread-safe."""
        return TextStream(self.normalizer, self.tokenizer, self._config.inputs.system)

    def features(self, samples: np.ndarray, rate: int) -> PromptFeatures:
        """Return the features of a recording (n,) float32 at `rate` Hz. Each feature is computed from the
        original recording, not from a version resampled for another. Tokens and mel are cut to the same
        duration."""
        speech = resample(samples, rate, SPEECH_RATE)
        tokens = self._speech_tokenizer(speech)
        mel = flow_mel(resample(samples, rate, self._config.sample_rate), self._config.mel)
        ratio = self._config.token_mel_ratio
        length = min(len(mel) // ratio, len(tokens))
        return PromptFeatures(tokens[:length], mel[: ratio * length], self._speaker_encoder(speech))

    def separated(self, text: str, prompt_text: str) -> tuple[str, str]:
        """Return (text to speak, prompt text): the beginning of a text that belongs to the prompt text is
        moved there. Raises MisplacedMark."""
        return self._prompt_texts.separated(text, prompt_text)

    def prompt_text(self, text: str, wanted: Wanted = always) -> PromptText:
        """Return the LLM's input for the prompt text of a recording, see PromptTexts. Raises Abandoned when
        the result is no longer wanted."""
        return self._prompt_texts(text, wanted)

    def speaker_prompt_text(self, text: str, speaker: str) -> PromptText:
        """The same for a stored voice, which has its own transcript: `text` is used only if it is an
        instruction."""
        return self._prompt_texts.stored(text, self.speakers[speaker].prompt_text_ids)
