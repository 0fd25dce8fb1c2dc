"""LRU cache of voices on this process's device."""

from __future__ import annotations

from collections import OrderedDict

import torch

from light_tts.engine.speech.work_item import Voice
from light_tts.server.core.messages import PromptRef
from light_tts.server.core.prompt_cache import attach

KEPT_VOICES = 64  # less than 1 MB each


class Voices:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._voices: OrderedDict[str, Voice] = OrderedDict()  # least recently used first

    def get(self, prompt: PromptRef) -> Voice:
        """Return the voice of a prompt. Raises FileNotFoundError if the prompt's owner has removed it,
        ValueError if its segment is damaged."""
        voice = self._voices.get(prompt.key)
        if voice is None:
            voice = self._voices[prompt.key] = self._load(prompt.segment)
            if len(self._voices) > KEPT_VOICES:
                self._voices.popitem(last=False)
        self._voices.move_to_end(prompt.key)
        return voice

    def _load(self, segment: str) -> Voice:
        voice = Voice.of(attach(segment), self._device)
        if self._device.type == "cuda":  # worker threads read it in CUDA streams of their own
            torch.cuda.current_stream(self._device).synchronize()
        return voice
