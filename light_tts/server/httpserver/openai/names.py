"""Names that OpenAI's clients use, and what they mean here: models and voices."""

from __future__ import annotations

import asyncio
from pathlib import Path

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openai.aliases import read_aliases
from light_tts.server.httpserver.voices import VoiceStore

MODEL_ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")


class Names:
    """The models and voices of this server. An alias of the table stands for the first voice of its list that
    there is; if none is, aliases are spread over all voices. A voice that has the name itself goes first."""

    def __init__(self, manager: HttpServerManager, voices: VoiceStore) -> None:
        self._manager = manager
        self._voices = voices
        self._aliases = read_aliases(manager.settings.voice_aliases)

    @property
    def models(self) -> list[str]:
        own = Path(self._manager.settings.model_dir).resolve().name
        styles = [style.name for style in self._manager.styles]
        return list(dict.fromkeys((own, *styles, *MODEL_ALIASES)))

    def style(self, model: str | None) -> int:
        """The style that a model of `models` means. Raises RequestError (404)."""
        if model is None:
            return 0
        for index, style in enumerate(self._manager.styles):
            if style.name == model:
                return index
        if model not in self.models:
            known = ", ".join(self.models)
            raise RequestError(
                404, f"the model {model[:64]!r} does not exist; known are {known}", field="model"
            )
        return 0

    async def voices(self) -> list[str]:
        """All that can be spoken with, without aliases."""
        stored = await asyncio.to_thread(self._voices.names)
        return sorted({*self._manager.checkpoint_speakers, *stored})

    async def aliases(self) -> dict[str, str]:
        """Alias -> voice, of those that stand for one."""
        voices = await self.voices()
        return {
            alias: self._meant(alias, voices) for alias in self._aliases if voices and alias not in voices
        }

    async def voice(self, name: str | None) -> str:
        """The voice that a name means; without a name the first one. Raises RequestError (400)."""
        voices = await self.voices()
        if name in voices:
            return name
        if voices and name is None:
            return voices[0]
        if voices and name in self._aliases:
            return self._meant(name, voices)
        what = "there is no voice yet" if name is None else f"unknown voice {name[:64]!r}"
        raise RequestError(
            400,
            f"{what}; GET /v1/audio/voices lists those there are, POST adds one, and ref_audio takes one "
            "with the request",
            field="voice",
        )

    def _meant(self, alias: str, voices: list[str]) -> str:
        preferred = next((name for name in self._aliases[alias] if name in voices), None)
        return preferred or voices[list(self._aliases).index(alias) % len(voices)]
