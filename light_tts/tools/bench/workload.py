"""The requests to send: texts, voice and length of the responses."""

from __future__ import annotations

import base64
import io
import wave
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp

from light_tts.server.core.default_checkpoint import PLACES

# That of the published figures; where there is no repository, one that comes with Light-TTS.
PROMPT = Path(__file__).resolve().parents[3] / "test" / "golden" / "cosyvoice2" / "prompt.wav"
if not PROMPT.exists():
    PROMPT = PLACES[0] / "voices" / "anna.wav"
TEXTS = (
    "The morning train was late again, and nobody seemed to mind.",
    "Please leave the keys with the neighbour before you go.",
    "Rain is expected in the north, with some sun towards the evening.",
    "She opened the letter slowly and read it twice.",
)

# The server's tokenizer is not known here. These words are so common that each is one token in the small
# vocabulary of test/golden/cosyvoice2/checkpoint, and most likely in a large one too.
TEXTS_OF_20_TOKENS = (
    "The day was long and bright, so we bought water for you and a train to the beach.",
    "We were on the quick train for ten minutes, and then you were out on the cold beach.",
    "He was by the long window every day, and the water was so bright to you and me.",
    "She was at the open window for seven minutes, and then the day was cold and so bright.",
)
TEXT_OF_16_TOKENS = "It is about ten minutes by train to the beach, so then we walk."

# Values that a preset assigns to options that are not given.
PRESETS: dict[str, dict[str, Any]] = {
    # The workload of the published LightTTS figures.
    "baseline16s": {
        "texts": TEXTS_OF_20_TOKENS,
        "prompt_text": TEXT_OF_16_TOKENS,
        "prompt_seconds": 3.0,
        "new_tokens": 400,
    },
    "short5s": {
        "texts": TEXTS_OF_20_TOKENS,
        "prompt_text": TEXT_OF_16_TOKENS,
        "prompt_seconds": 3.5,
        "new_tokens": 125,
    },
}


@dataclass(frozen=True)
class Workload:
    """The requests of one run; request i speaks text i (cyclically) with seed `seed + i`."""

    texts: tuple[str, ...]
    fields: dict[str, Any]
    prompt_wav: bytes | None
    seed: int
    as_json: bool

    @cached_property
    def _prompt_base64(self) -> dict[str, str]:
        return {} if self.prompt_wav is None else {"prompt_wav": base64.b64encode(self.prompt_wav).decode()}

    def body(self, index: int) -> dict[str, Any]:
        """Return the keyword arguments of aiohttp's `post` for request `index`."""
        text = self.texts[index % len(self.texts)]
        fields = {**self.fields, "tts_text": text, "seed": self.seed + index}
        if self.as_json:
            return {"json": fields | self._prompt_base64}
        form = aiohttp.FormData()
        for name, value in fields.items():
            form.add_field(name, str(value))
        if self.prompt_wav is not None:
            form.add_field("prompt_wav", self.prompt_wav, filename="prompt.wav", content_type="audio/wav")
        return {"data": form}


def recording(path: Path, seconds: float | None) -> bytes:
    """Return the bytes of a recording; with `seconds`, a WAV file cut or repeated to that length. Raises
    OSError or ValueError naming the file."""
    if seconds is None:
        return path.read_bytes()
    try:
        with wave.open(str(path), "rb") as source:
            params, sound = source.getparams(), source.readframes(source.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: {error}; only a PCM WAV file can be cut to a length") from None
    if not sound:
        raise ValueError(f"{path}: no sound in it")
    length = round(seconds * params.framerate) * params.nchannels * params.sampwidth
    written = io.BytesIO()
    with wave.open(written, "wb") as target:
        target.setparams(params)
        target.writeframes((sound * (length // len(sound) + 1))[:length])
    return written.getvalue()


def read_texts(path: Path) -> tuple[str, ...]:
    """Return the non-blank lines of a file. Raises OSError or ValueError naming the file."""
    texts = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    if not texts:
        raise ValueError(f"{path}: no text in it")
    return texts
