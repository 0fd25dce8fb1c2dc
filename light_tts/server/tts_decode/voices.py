"""Voices on this process's device: those of the checkpoint, and the prompts used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch

from light_tts.common.prompt_features import PromptFeatures
from light_tts.models.cosyvoice2.token2wav import Voice
from light_tts.server.core.messages import PromptRef
from light_tts.server.core.prompt_cache import attach

KEPT_PROMPTS = 64  # under 1 MB each


class UnknownVoice(Exception):
    """No such speaker in the checkpoint."""


class Voices:
    def __init__(self, speakers: Mapping[str, PromptFeatures], device: torch.device) -> None:
        self._device = device
        self._speakers = {name: self._load(features) for name, features in speakers.items()}
        self._prompts: OrderedDict[str, Voice] = OrderedDict()  # least recently used first

    def get(self, prompt: PromptRef | None, speaker: str) -> Voice:
        """Raises FileNotFoundError if the prompt's owner has removed it, ValueError if its segment is
        damaged, UnknownVoice."""
        if prompt is None:
            if speaker not in self._speakers:
                raise UnknownVoice(f"the checkpoint has no speaker {speaker!r}")
            return self._speakers[speaker]
        voice = self._prompts.get(prompt.key)
        if voice is None:
            voice = self._prompts[prompt.key] = self._load(attach(prompt.segment))
            if len(self._prompts) > KEPT_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(prompt.key)
        return voice

    def _load(self, features: PromptFeatures) -> Voice:
        voice = Voice.of(features, self._device)
        if self._device.type == "cuda":  # worker threads read it in streams of their own
            torch.cuda.current_stream(self._device).synchronize()
        return voice
