"""Instructions how to speak: the text before the mark tells the model how, and is never spoken itself."""

from __future__ import annotations

END_OF_PROMPT = "<|endofprompt|>"


def as_prompt_text(instruction: str) -> str:
    """The prompt text that makes an instruction of it. Raises ValueError where the mark stands within it or
    nothing is left."""
    text = instruction.strip().removesuffix(END_OF_PROMPT).strip()
    if not text:
        raise ValueError("is empty")
    if END_OF_PROMPT in text:
        raise ValueError(f"has {END_OF_PROMPT} before its end")
    return text + END_OF_PROMPT
