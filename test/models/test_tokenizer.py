"""The text tokenizer and the mel filters equal those of transformers, which the server does not import."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.audio_utils import mel_filter_bank

from light_tts.models.checkpoint.special_tokens import COSYVOICE2_TOKENS, COSYVOICE3_TOKENS
from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.models.frontend.features import mel_filters
from light_tts.models.frontend.tokenizer import FOLDER, TextTokenizer

TINY = Path("test/golden/cosyvoice2/checkpoint")
TINY3 = Path("test/golden/cosyvoice3/checkpoint")
BUNDLED = Path("pretrained_models/light-tts-mini")
END_OF_TEXT = "<|endoftext|>"
PIECES = (
    END_OF_TEXT,
    *(
        "the",
        "The",
        "hello",
        "ing",
        "'s",
        "'LL",
        "don't",
        "3",
        "1234",
        "ＡＢ",
        "café",
        "cafe\u0301",
        "\u1112\u1161",
    ),
    *(
        "今天",
        "天气",
        "，",
        "。",
        "😀",
        "👩‍👩‍👧",
        "\u200b",
        "\ufeff",
        "\x00",
        "٣",
        "ﬁ",
        "ß",
        "İ",
        "ไทย",
        "мир",
    ),
    *(" ", "  ", "\n", "\r\n", "\t", "\u3000", ".", "...", "?!", "(", "]", "<|", "|>", "[", "<strong"),
)


def reference(checkpoint: Path, special_tokens: tuple[str, ...]) -> AutoTokenizer:
    """Return transformers' tokenizer with the special tokens, as CosyVoice creates it."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / FOLDER, local_files_only=True)
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    tokenizer.add_special_tokens({**special, "additional_special_tokens": list(special_tokens)})
    return tokenizer


def texts(special_tokens: tuple[str, ...]) -> list[str]:
    """Return texts of random pieces, special tokens among them, and of random characters."""
    draw = random.Random(0)
    pieces = (*special_tokens, *PIECES)
    mixed = ["".join(draw.choices(pieces, k=draw.randrange(12))) for _ in range(1000)]
    usable = [code for code in range(0x2FFFF) if not 0xD800 <= code < 0xE000]
    odd = ["".join(chr(draw.choice(usable)) for _ in range(10)) for _ in range(500)]
    ascii_only = ["".join(chr(draw.randrange(128)) for _ in range(40)) for _ in range(500)]
    return mixed + odd + ascii_only


def changed(config: dict, tmp_path: Path) -> Path:
    """Return a checkpoint with the tiny tokenizer and this tokenizer_config.json."""
    shutil.copytree(TINY / FOLDER, tmp_path / FOLDER, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / FOLDER / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def assert_equal(checkpoint: Path, special_tokens: tuple[str, ...] = COSYVOICE2_TOKENS) -> None:
    ours, theirs = TextTokenizer(checkpoint, special_tokens), reference(checkpoint, special_tokens)
    assert len(ours) == len(theirs) and ours.eos_token_id == theirs.eos_token_id
    assert [ours.token_id(token) for token in special_tokens] == theirs.convert_tokens_to_ids(special_tokens)
    assert ours.special_tokens == [str(token) for token in theirs.added_tokens_decoder.values()]
    for text in texts(special_tokens):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        spelled = "".join(word for word, _ in ours.words_of(ids))
        whole = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert "".join(spelled.split()) == "".join(whole.split()), text


@pytest.mark.parametrize(
    ("checkpoint", "special_tokens"),
    [(TINY, COSYVOICE2_TOKENS), (BUNDLED, COSYVOICE2_TOKENS), (TINY3, COSYVOICE3_TOKENS)],
    ids=["tiny", "bundled", "tiny CosyVoice3"],
)
def test_ids_are_those_of_transformers(checkpoint: Path, special_tokens: tuple[str, ...]):
    assert_equal(checkpoint, special_tokens)


@pytest.mark.parametrize("missing", ["added_tokens_decoder", "tokenizer_class", "additional_special_tokens"])
def test_the_configuration_may_omit_what_has_a_default(missing: str, tmp_path: Path):
    config = json.loads((TINY / FOLDER / "tokenizer_config.json").read_text())
    del config[missing]
    assert_equal(changed(config, tmp_path))


def test_added_tokens_have_the_ids_and_properties_of_the_configuration(tmp_path: Path):
    config = json.loads((TINY / FOLDER / "tokenizer_config.json").read_text())
    token = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": True, "special": False}
    added = {"763": {"content": "hello", **token}, **config["added_tokens_decoder"]}
    assert_equal(changed({**config, "added_tokens_decoder": added}, tmp_path))


def test_another_kind_of_tokenizer_is_an_error(tmp_path: Path):
    config = json.loads((TINY / FOLDER / "tokenizer_config.json").read_text())
    checkpoint = changed({**config, "tokenizer_class": "LlamaTokenizer"}, tmp_path)
    with pytest.raises(CheckpointError, match="expected a Qwen2Tokenizer, found 'LlamaTokenizer'"):
        TextTokenizer(checkpoint)


@pytest.mark.parametrize(
    ("rate", "n_fft", "mels", "fmin", "fmax"),
    [
        (16_000, 400, 128, 0.0, 8000.0),  # speech tokenizer
        (24_000, 1920, 80, 0.0, 8000.0),  # flow
        (24_000, 1920, 80, 0.0, 12_000.0),
        (22_050, 1024, 40, 50.0, 900.0),
        (44_100, 2048, 100, 1200.5, 20_000.0),
    ],
)
def test_mel_filters_are_those_of_transformers(rate: int, n_fft: int, mels: int, fmin: float, fmax: float):
    expected = mel_filter_bank(n_fft // 2 + 1, mels, fmin, fmax, rate, norm="slaney", mel_scale="slaney").T
    np.testing.assert_array_equal(mel_filters(rate, n_fft, mels, fmin, fmax), expected)
