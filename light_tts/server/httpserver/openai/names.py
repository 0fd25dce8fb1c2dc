"""Maps the model and voice names of OpenAI's clients to styles and voices of this server."""

from __future__ import annotations

import asyncio
from pathlib import Path

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openai.aliases import read_aliases
from light_tts.server.httpserver.voices import VoiceStore

MODEL_ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")


class Names:
    """The models and voices of this server. An alias means the first existing voice in its list; if none of
    them exists, aliases are distributed over all voices. A voice of the same name takes precedence."""

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
        """Return the style for a model in `models`. Raises RequestError (404)."""
        if model is None:
            return 0
        for index, style in enumerate(self._manager.styles):
            if style.name == model:
                return index
        if model not in self.models:
            known = ", ".join(self.models)
            raise RequestError(
                404, f"the model {model[:64]!r} does not exist; available: {known}", field="model"
            )
        return 0

    async def voices(self) -> list[str]:
        """Return all voices, without aliases."""
        stored = await asyncio.to_thread(self._voices.names)
        return sorted({*self._manager.checkpoint_speakers, *stored})

    async def aliases(self) -> dict[str, str]:
        """Return alias -> voice for all aliases that have one."""
        voices = await self.voices()
        return {
            alias: self._meant(alias, voices) for alias in self._aliases if voices and alias not in voices
        }

    async def voice(self, name: str | None) -> str:
        """Return the voice with this name or alias, or the first voice if None. Raises RequestError (400)."""
        if name is not None and (name in self._manager.checkpoint_speakers or self._voices.has(name)):
            return name
        voices = await self.voices()
        if voices and name is None:
            return voices[0]
        if voices and name in self._aliases:
            return self._meant(name, voices)
        what = "there are no voices yet" if name is None else f"unknown voice {name[:64]!r}"
        raise RequestError(
            400,
            f"{what}; GET /v1/audio/voices lists the voices, POST adds one, and ref_audio sends one with "
            "the request",
            field="voice",
        )

    def _meant(self, alias: str, voices: list[str]) -> str:
        preferred = next((name for name in self._aliases[alias] if name in voices), None)
        return preferred or voices[list(self._aliases).index(alias) % len(voices)]
