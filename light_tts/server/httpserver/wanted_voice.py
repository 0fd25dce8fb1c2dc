"""The voice of a request in the OpenAI and ElevenLabs APIs: a name or a recording, with an optional
instruction."""

from __future__ import annotations

from starlette.datastructures import State

from light_tts.common.instructions import as_prompt_text
from light_tts.server.core.messages import Prompt
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import VoiceChoice


async def wanted_voice(
    state: State,
    voice: str | None,
    recording: bytes | str | None = None,
    recording_text: str | None = None,
    instructions: str | None = None,
) -> Prompt:
    """Return the prompt. `recording`, or its URL, takes precedence over `voice`; without its transcript only
    the timbre is used. `state`: that of the app. Raises RequestError."""
    text = recording_text
    if instructions is not None:
        text = instruction_text(instructions)
    if isinstance(recording, str):
        recording = await state.remote_recordings.read(recording)
    if recording is not None:
        choice = VoiceChoice(prompt_wav=recording, prompt_text=text or "")
    elif recording_text is not None:
        raise RequestError(400, "ref_text requires ref_audio, which is missing", field="ref_audio")
    else:
        choice = VoiceChoice(spk_id=await state.names.voice(voice), prompt_text=text)
    return await state.prompts.prompt(choice)


def instruction_text(instructions: str, field: str = "instructions") -> str:
    """Return the prompt text for an instruction received in this field. Raises RequestError."""
    try:
        return as_prompt_text(instructions)
    except ValueError as error:
        raise RequestError(400, f"{field} {error}", field=field) from None
