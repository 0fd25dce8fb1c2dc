"""Trains the text tokenizer: a byte-level BPE in Qwen2's format.

    python -m training.lm.text_tokenizer [--languages en zh] [--work build/train_mini]

Requires the sentences. Writes to the checkpoint unless it has a tokenizer already: other ids would not match
a language model trained with it. With Mandarin, the tokenizer is extended by ids for the most common
characters unless it has such (each would otherwise take three ids, one per byte), and so is the training file
of the language model; its output for other texts does not change.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from light_tts.models.frontend.tokenizer import FILES, FOLDER, TextTokenizer, load_qwen2
from light_tts.tools.tiny_checkpoint import SMALL_PARTS
from training.checkpoint import (
    END_OF_TEXT,
    SPECIAL_IDS,
    checkpoint_folder,
    training_file,
    write_config,
)
from training.corpus.mandarin import FILE as MANDARIN
from training.lm.weights import BEST, NAME
from training.work import language_parser, read_lines

CHARACTERS = 2700  # what fits in a checkpoint of 45 MB; rarer characters take two or three ids


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write the tokenizer's files to the checkpoint `folder`. Ids: 256 bytes, merges, and from END_OF_TEXT on
    the special tokens, which are added when it is loaded."""
    qwen2 = load_qwen2(SMALL_PARTS / FOLDER)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=END_OF_TEXT, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(target))
    write_special_tokens(target, END_OF_TEXT)


def add_characters(texts: Iterable[str], folder: Path) -> int:
    """Add ids to the tokenizer of the checkpoint `folder` for the CHARACTERS most frequent non-ASCII
    characters in `texts`, after the existing ids, so that other texts keep theirs. Returns the number of new
    ids, 0 if the tokenizer had such before."""
    target = folder / FOLDER
    vocabulary: dict[str, int] = json.loads((target / "vocab.json").read_text("utf-8"))
    merges = (target / "merges.txt").read_text("utf-8").rstrip("\n").split("\n")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    counts = Counter(character for text in texts for character in text if not character.isascii())
    before = len(vocabulary)
    for character, _ in counts.most_common(CHARACTERS):
        ((written, _),) = byte_level.pre_tokenize_str(character)  # one letter per byte
        if written in vocabulary:
            return 0
        for end in range(2, len(written) + 1):
            if written[:end] not in vocabulary:
                vocabulary[written[:end]] = len(vocabulary)
                merges.append(f"{written[: end - 1]} {written[end - 1]}")
    (target / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (target / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
    write_special_tokens(target, len(vocabulary))
    return len(vocabulary) - before


def write_special_tokens(target: Path, end_of_text: int) -> None:
    """Write the files that define the special ids: those from end_of_text on."""
    template = SMALL_PARTS / FOLDER
    config = json.loads((template / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"].values()
    config["added_tokens_decoder"] = {str(end_of_text + n): token for n, token in enumerate(added)}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    generation = json.loads((template / "generation_config.json").read_text())
    generation.update(bos_token_id=end_of_text, eos_token_id=end_of_text)
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2))


def add_rows(weights: dict[str, Tensor], new: int) -> dict[str, Tensor]:
    """Return weights of a `TrainedLM` with `new` text ids inserted before the special ones and initialized
    randomly."""
    found = dict(weights)
    for name, table in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = 0.02 * torch.randn(new, table.shape[1], generator=torch.Generator().manual_seed(0))
            text, special = table[:-SPECIAL_IDS], table[-SPECIAL_IDS:]
            found[name] = torch.cat([text, rows.to(table.dtype), special])
    return found


def grow(path: Path, new: int) -> None:
    """Add `new` text ids to a training file of the language model."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    saved["model"] = {name: add_rows(weights, new) for name, weights in saved["model"].items()}
    torch.save(saved, path)


def main() -> None:
    args = language_parser(__doc__).parse_args()
    sentences = [s for s in read_lines(args.work / "sentences.jsonl") if s["split"] == "train"]
    write_config(args.work)
    folder = checkpoint_folder(args.work)
    if not all((folder / FOLDER / name).exists() for name in FILES):
        train_tokenizer((sentence["spoken"] for sentence in sentences), folder)
    if "zh" in args.languages:
        mandarin = [s["spoken"] for s in read_lines(args.work / MANDARIN) if s["split"] == "train"]
        if new := add_characters(mandarin, folder):
            if (path := training_file(args.work, NAME)).exists():
                grow(path, new)
            training_file(args.work, BEST).unlink(missing_ok=True)  # selected before it learned any Mandarin
        write_config(args.work)
        tokenizer = TextTokenizer(folder)
        ids = sum(len(tokenizer.encode(text)) for text in mandarin[:2000])
        characters = sum(map(len, mandarin[:2000]))
        print(f"{new} new text ids, {ids / characters:.2f} for each Mandarin character")
    tokenizer = TextTokenizer(folder)
    ids = sum(len(tokenizer.encode(sentence["spoken"])) for sentence in sentences[:2000])
    phonemes = sum(len(sentence["phonemes"]) for sentence in sentences[:2000])
    print(f"{len(tokenizer)} text ids, {phonemes / ids:.2f} phonemes for each id of a text")


if __name__ == "__main__":
    main()
