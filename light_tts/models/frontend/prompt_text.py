"""Converts prompt texts to the LLM's input."""

from __future__ import annotations

from dataclasses import dataclass

from light_tts.common.instructions import END_OF_PROMPT, MisplacedMark
from light_tts.models.frontend.text import TextNormalizer, Wanted, always
from light_tts.models.frontend.tokenizer import TextTokenizer

KEPT_PROMPT_TEXTS = 1024


@dataclass(frozen=True)
class PromptText:
    """The LLM's input for a prompt: `ids` precede the text; `with_speech`: whether the prompt's speech tokens
    follow it; `leading`: the number of ids up to and including <|endofprompt|>, 0 for a family without
    a `system`."""

    ids: list[int]
    with_speech: bool
    leading: int = 0


class PromptTexts:
    """The prompt texts of a family; `system`: see InputFormat. Thread-safe.

    Up to the last <|endofprompt|> a prompt text is used as it is, and what follows is the transcript of the
    recording. Without a transcript, only the flow uses the voice: the prompt text is an instruction, or the
    mode is cross-lingual. With a `system`, it precedes an instruction that does not begin with it, and a
    prompt text without <|endofprompt|>. Without one, a text that goes on after <|endofprompt|> is a
    transcript.
    """

    def __init__(self, tokenizer: TextTokenizer, normalizer: TextNormalizer, system: str) -> None:
        self._tokenizer = tokenizer
        self._normalizer = normalizer
        self._system = system
        self._mark = tokenizer.token_id(END_OF_PROMPT)
        self._made: dict[str, PromptText] = {}  # LRU cache, most recent last

    def __call__(self, text: str, wanted: Wanted = always) -> PromptText:
        """Return the LLM's input. The most recent ones are cached, since voices are reused. Raises Abandoned
        when the result is no longer wanted."""
        made = self._made.pop(text, None) or self._make(text, wanted)
        self._made[text] = made
        if len(self._made) > KEPT_PROMPT_TEXTS:
            self._made.pop(next(iter(self._made)), None)
        return made

    def at_once(self, text: str) -> bool:
        """Whether a call with this text takes well under a millisecond."""
        return text in self._made or self._normalizer.at_once(self._divided(text)[1])

    def stored(self, text: str, transcript: list[int]) -> PromptText:
        """Return the LLM's input for a voice with a transcript of its own, given as ids, which may begin with
        a `system` or an instruction; of `text` only an instruction is used."""
        leading, spoken = self._divided(text)
        if END_OF_PROMPT in text and not spoken:
            return self(text)
        if not self._system:
            return PromptText(transcript, with_speech=bool(transcript))
        end = next((end for end in range(len(transcript), 0, -1) if transcript[end - 1] == self._mark), 0)
        lead = self._tokenizer.encode(leading) if END_OF_PROMPT in text or not end else transcript[:end]
        return PromptText(lead + transcript[end:], bool(transcript[end:]), len(lead))

    def separated(self, text: str, prompt_text: str) -> tuple[str, str]:
        """Return (text to speak, prompt text) for a text that may begin like a prompt text: the part up to
        the last <|endofprompt|> is not spoken and becomes the beginning of the prompt text. Raises
        MisplacedMark if that has an <|endofprompt|> as well."""
        if not self._system or END_OF_PROMPT not in text:
            return text, prompt_text
        if END_OF_PROMPT in prompt_text:
            raise MisplacedMark(f"{END_OF_PROMPT} is both in the text and in the prompt text")
        leading, mark, spoken = text.rpartition(END_OF_PROMPT)
        return spoken, leading + mark + prompt_text

    def _make(self, text: str, wanted: Wanted) -> PromptText:
        leading, transcript = self._divided(text)
        ids = self._tokenizer.encode(leading)
        count = len(ids) if self._system else 0
        if transcript:
            ids += self._tokenizer.encode(self._normalizer.normalize(transcript, wanted))
        return PromptText(ids, bool(transcript), count)

    def _divided(self, text: str) -> tuple[str, str]:
        """Return (what is used as it is, transcript)."""
        leading, mark, transcript = text.rpartition(END_OF_PROMPT)
        if not self._system:
            if mark and not transcript:
                return text, ""
            return "", text if text.strip() else ""
        if not mark:
            leading = self._system
        elif not transcript.strip() and not leading.strip().startswith(self._system):
            leading = f"{self._system} {leading.strip()}".rstrip()
        return leading + END_OF_PROMPT, transcript if transcript.strip() else ""
