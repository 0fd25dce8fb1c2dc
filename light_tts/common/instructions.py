"""Instructions on how to speak: the text before the end mark instructs the model and is not spoken."""

from __future__ import annotations

END_OF_PROMPT = "<|endofprompt|>"


class MisplacedMark(Exception):
    """The end mark is where none is allowed; the message is for the client."""


def as_prompt_text(instruction: str) -> str:
    """Return the prompt text for an instruction. Raises ValueError if it contains the end mark or is
    empty.
    """
    text = instruction.strip().removesuffix(END_OF_PROMPT).strip()
    if not text:
        raise ValueError("is empty")
    if END_OF_PROMPT in text:
        raise ValueError(f"has {END_OF_PROMPT} before its end")
    return text + END_OF_PROMPT
