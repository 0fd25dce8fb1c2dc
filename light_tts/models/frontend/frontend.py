"""Converts a client's input (texts, a recording or the name of a voice) to the models' input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from light_tts.common.audio import resample
from light_tts.common.instructions import END_OF_PROMPT
from light_tts.common.prompt_features import PromptFeatures
from light_tts.models.checkpoint.config import Config
from light_tts.models.frontend.features import SPEECH_RATE, flow_mel
from light_tts.models.frontend.speaker import OnnxSpeakerEncoder, load_speakers
from light_tts.models.frontend.speech_tokenizer import OnnxSpeechTokenizer
from light_tts.models.frontend.spellers import Spell
from light_tts.models.frontend.text import TextNormalizer, Wanted, always
from light_tts.models.frontend.text_stream import TextStream
from light_tts.models.frontend.tokenizer import TextTokenizer

KEPT_PROMPT_TEXTS = 1024
KEPT_ENCODINGS = 64


@dataclass(frozen=True)
class PromptText:
    """The LLM's input for a prompt: `ids` precede the text; `with_speech`: whether the prompt's speech tokens
    follow it."""

    ids: list[int]
    with_speech: bool


class Frontend:
    """All components of a checkpoint that run before the LLM. Thread-safe."""

    def __init__(
        self,
        model_dir: Path,
        config: Config,
        spellers: dict[str, Spell] | None = None,
        spelled_at_once: int = 1,
    ) -> None:
        """`spellers`, `spelled_at_once`: see TextNormalizer. Raises CheckpointError naming the file that is
        missing or damaged."""
        self._config = config
        self.tokenizer = TextTokenizer(model_dir)
        # a text of one sentence is measured, and measured again as a piece, before its ids are taken
        self._encode = lru_cache(KEPT_ENCODINGS)(self.tokenizer.encode)
        self.normalizer = TextNormalizer(lambda text: len(self._encode(text)), spellers, spelled_at_once)
        self._speech_tokenizer = OnnxSpeechTokenizer(model_dir)
        self._speaker_encoder = OnnxSpeakerEncoder(model_dir)
        self.speakers = load_speakers(model_dir, config)
        self.takes_instructions = config.instructions
        self._prompt_texts: dict[str, PromptText] = {}  # LRU cache, most recent last

    def split_text(self, text: str, wanted: Wanted = always) -> list[list[int]]:
        """Return the normalised pieces of a text as ids; empty if there is nothing to say. Raises Abandoned
        when the result is no longer wanted."""
        pieces = [self._encode(piece) for piece in self.normalizer.split(text, wanted)]
        return [list(ids) for ids in pieces if ids]

    def at_once(self, text: str, prompt_text: str) -> bool:
        """Whether `split_text` and `prompt_text` take well under a millisecond for these two."""
        known = prompt_text in self._prompt_texts or self.normalizer.at_once(prompt_text)
        return known and self.normalizer.at_once(text)

    def words(self, ids: list[int]) -> list[tuple[str, int]]:
        """Return the words of a piece from `split_text`, and the number of ids of each."""
        return self.tokenizer.words_of(ids)

    def text_stream(self) -> TextStream:
        """Return a stream for text that arrives while it is spoken. Not thread-safe."""
        return TextStream(self.normalizer, self.tokenizer)

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

    def prompt_text(self, text: str, wanted: Wanted = always) -> PromptText:
        """Return the LLM's input for a recording's transcript. The most recent ones are cached, since voices
        are reused. Raises Abandoned when the result is no longer wanted."""
        made = self._prompt_texts.pop(text, None) or self._make_prompt_text(text, wanted)
        self._prompt_texts[text] = made
        if len(self._prompt_texts) > KEPT_PROMPT_TEXTS:
            self._prompt_texts.pop(next(iter(self._prompt_texts)), None)
        return made

    def _make_prompt_text(self, text: str, wanted: Wanted) -> PromptText:
        """The mode follows from the prompt text: an instruction if it ends with <|endofprompt|>, or
        cross-lingual if it is empty (in both cases only the flow uses the voice), else the transcript of the
        recording."""
        if text.endswith(END_OF_PROMPT):
            return PromptText(self.tokenizer.encode(text), with_speech=False)
        if not text.strip():
            return PromptText([], with_speech=False)
        return PromptText(self.tokenizer.encode(self.normalizer.normalize(text, wanted)), with_speech=True)

    def speaker_prompt_text(self, text: str, speaker: str) -> PromptText:
        """The same for a stored voice, which has its own transcript: `text` is used only if it is an
        instruction."""
        if text.endswith(END_OF_PROMPT):
            return self.prompt_text(text)
        stored = self.speakers[speaker]
        return PromptText(stored.prompt_text_ids, with_speech=bool(stored.prompt_text_ids))
