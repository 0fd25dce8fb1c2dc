"""The input format of each family: its speech tokenizer, special tokens and prompt texts."""

from __future__ import annotations

from dataclasses import dataclass

from light_tts.models.checkpoint.special_tokens import COSYVOICE2_TOKENS, COSYVOICE3_TOKENS


@dataclass(frozen=True)
class InputFormat:
    """`speech_tokenizer`: name of its file; `special_tokens`: those of the text tokenizer, in the order of
    their ids; `kept_tokens`: those of them that a text is normalised around; `system`: what precedes
    <|endofprompt|> in every prompt text, followed by the instruction if there is one. An empty `system` means
    that only an instruction is followed by <|endofprompt|>."""

    speech_tokenizer: str
    special_tokens: tuple[str, ...]
    kept_tokens: tuple[str, ...] = ()
    system: str = ""


COSYVOICE2_INPUTS = InputFormat("speech_tokenizer_v2.onnx", COSYVOICE2_TOKENS)
COSYVOICE3_INPUTS = InputFormat(
    "speech_tokenizer_v3.onnx",
    COSYVOICE3_TOKENS,
    kept_tokens=tuple(token for token in COSYVOICE3_TOKENS if not token.startswith("<|")),
    system="You are a helpful assistant.",
)
