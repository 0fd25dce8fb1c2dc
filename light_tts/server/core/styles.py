"""The styles of a checkpoint. Each is a complete set of LLM weights with a name (`tts_model_name`)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

STYLE_FILE = "style_config.json"
DEFAULT_STYLE = "cosyvoice"
DEFAULT_LLM = "llm.pt"


class StyleError(ValueError):
    """Invalid style_config.json; the message names the file and the entry."""


class Style(NamedTuple):
    name: str
    llm_path: Path


class _StyleEntry(msgspec.Struct):
    style_name: str
    llm_path: str | None = None
    gpt_model_path: str | None = None  # older name of llm_path


class _StyleFile(msgspec.Struct):
    lora_info: list[_StyleEntry]


def load_styles(model_dir: str | Path) -> tuple[Style, ...]:
    """Return the styles in the order of `model_dir`/style_config.json; the first is the default. Without that
    file there is one style, whose weights are llm.pt. Raises StyleError."""
    model_dir = Path(model_dir)
    path = model_dir / STYLE_FILE
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=_StyleFile).lora_info
    except FileNotFoundError:
        entries = [_StyleEntry(style_name=DEFAULT_STYLE, llm_path=DEFAULT_LLM)]
        path = model_dir
    except (OSError, ValueError) as error:
        raise StyleError(f"{path}: {error}") from error
    if not entries:
        raise StyleError(f"{path}: lora_info is empty; leave the file out to have one style")
    styles: list[Style] = []
    for entry in entries:
        name = entry.style_name
        weights = entry.llm_path or entry.gpt_model_path
        if not name or name == "default" or any(name == style.name for style in styles):
            raise StyleError(f"{path}: style_name {name!r} is empty, reserved or used twice")
        if not weights:
            raise StyleError(f"{path}: style {name!r} has no llm_path")
        llm_path = model_dir / weights
        if not llm_path.is_file():
            raise StyleError(f"{path}: weights of style {name!r} are missing: {llm_path}")
        styles.append(Style(name, llm_path))
    return tuple(styles)
