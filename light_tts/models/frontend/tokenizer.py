"""The text tokenizer: Qwen2's byte-level BPE with the special tokens of a family."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from light_tts.models.checkpoint.special_tokens import COSYVOICE2_TOKENS
from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.models.frontend.token_strings import TokenStrings

FOLDER = "CosyVoice-BlankEN"
FILES = ("config.json", "tokenizer_config.json", "vocab.json", "merges.txt")
FIRST_CJK = "\u2e80"
_END_OF_TEXT = "<|endoftext|>"
_KINDS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "qwen2")  # values of tokenizer_class, or of model_type
# How Qwen2 splits a text into words, which are encoded separately.
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


class TextTokenizer:
    """Text to ids. Thread-safe."""

    def __init__(self, model_dir: Path, special_tokens: Sequence[str] = COSYVOICE2_TOKENS) -> None:
        """`special_tokens`: those of the family, in the order of their ids. Raises CheckpointError for a
        missing or damaged file."""
        folder = model_dir / FOLDER
        for name in FILES:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: no such file")
        try:
            self._encoding = load_qwen2(folder, special_tokens)
        except Exception as error:  # any exception that a damaged file causes
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{folder}: cannot load the tokenizer: {reason}") from error
        self.eos_token_id = self.token_id(_END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Special tokens in the text become their ids; none are added."""
        return self._encoding.encode(text, add_special_tokens=False).ids

    @cached_property
    def special_tokens(self) -> list[str]:
        """Strings that are always single tokens."""
        return [token.content for token in self._encoding.get_added_tokens_decoder().values()]

    @cached_property
    def special_strings(self) -> TokenStrings:
        return TokenStrings(self.special_tokens)

    def words(self, text: str) -> list[int]:
        """Return the start of each separately encoded word; `text` is composed (NFC) and contains no special
        tokens."""
        return [begin for _, (begin, _) in self._encoding.pre_tokenizer.pre_tokenize_str(text)]

    def words_of(self, ids: list[int]) -> list[tuple[str, int]]:
        """Return the words that these ids spell, including adjacent punctuation, with the number of ids of
        each. In scripts without spaces each character is a word."""
        words: list[list[int]] = []
        whole = True  # whether the text so far ends with a complete character
        for token in ids:
            text = self._encoding.decode([token], skip_special_tokens=False)
            begins = text.startswith(" ") or (text[:1] >= FIRST_CJK and text[:1].isalnum())
            if not words or (whole and begins):
                words.append([])
            words[-1].append(token)
            whole = "\ufffd" not in self._encoding.decode(words[-1], skip_special_tokens=False)
        spelled = (self._encoding.decode(word, skip_special_tokens=False).strip() for word in words)
        return [(text, len(word)) for text, word in zip(spelled, words, strict=True)]

    def settled(self, word: str) -> list[tuple[int, int]]:
        """Return (id, number of UTF-8 bytes) of the tokens at the start of a word that any continuation
        keeps.

        The encoding of a word up to a token boundary is the encoding of the word's prefix up to there. The
        first token that extends beyond the known end starts with the known text after some position. So the
        tokens shared by the encodings of all prefixes up to such positions are final.
        """
        ((word_bytes, _),) = self._encoding.pre_tokenizer.pre_tokenize_str(word)  # one character per byte
        size = len(word_bytes)
        borders = [begin for begin in range(size) if self._grows(word_bytes[begin:])] + [size]
        tokenize = self._encoding.model.tokenize
        ways = [[(token.id, len(token.value)) for token in tokenize(word_bytes[:end])] for end in borders]
        agreed = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ways, strict=False))
        return [tokens[0] for tokens in agreed]

    def _grows(self, begin: str) -> bool:
        """Return whether `begin` is a proper prefix of a longer token."""
        following = bisect_right(self._sorted_tokens, begin)
        return following < len(self._sorted_tokens) and self._sorted_tokens[following].startswith(begin)

    @cached_property
    def _sorted_tokens(self) -> list[str]:
        return sorted(self._encoding.get_vocab(with_added_tokens=False))

    def token_id(self, token: str) -> int:
        """Return the id of a token, special or not. Raises KeyError."""
        found = self._encoding.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found

    def __len__(self) -> int:
        """Number of different tokens."""
        return self._encoding.get_vocab_size(with_added_tokens=True)


def load_qwen2(folder: Path, special_tokens: Sequence[str] = COSYVOICE2_TOKENS) -> Tokenizer:
    """Return Qwen2's tokenizer with these special tokens from the FILES in a folder: what transformers'
    AutoTokenizer makes of them, without its import, which takes seconds. Raises ValueError for another kind
    of tokenizer, and other exceptions for a damaged file."""
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    model = json.loads((folder / "config.json").read_text("utf-8"))
    kind = config.get("tokenizer_class") or model.get("model_type")
    if kind not in _KINDS:
        raise ValueError(f"expected a Qwen2Tokenizer, found {kind!r} (tokenizer_class or model_type)")
    tokenizer = Tokenizer(
        models.BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            continuing_subword_prefix="",
            end_of_word_suffix="",
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokenizer.add_tokens([AddedToken(**token) for _, token in added])
    tokenizer.add_special_tokens([_END_OF_TEXT, *special_tokens])
    return tokenizer
