"""Trains the text tokenizer: a byte-level BPE in Qwen2's format.

    python -m training.lm.text_tokenizer [--languages en zh] [--work build/train_mini]

Needs the sentences. Writes into the checkpoint, unless a tokenizer is there: other ids would not fit a
language model that was trained with it. With Mandarin, the tokenizer gets ids for the commonest characters
unless it has such (each would take three ids, one a byte), and so does the training file of the language
model: what it says of other texts stays as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer

from light_tts.models.frontend.tokenizer import FILES, FOLDER, TextTokenizer
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

CHARACTERS = 2700  # what a checkpoint of 45 MB has room for; rarer ones take two or three ids


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Writes the tokenizer's files into the checkpoint `folder`. Ids: 256 bytes, merges, and from END_OF_TEXT
    on the special tokens, which are added when it is loaded."""
    template = SMALL_PARTS / FOLDER
    qwen2 = AutoTokenizer.from_pretrained(template, local_files_only=True).backend_tokenizer
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
    """Gives the tokenizer of the checkpoint `folder` an id for each of the CHARACTERS characters beyond ASCII
    that `texts` have most often, or as many as they have, behind the ids that it has: texts without them keep
    theirs. -> How many ids are new, 0 where the tokenizer had such before."""
    target = folder / FOLDER
    vocabulary: dict[str, int] = json.loads((target / "vocab.json").read_text("utf-8"))
    merges = (target / "merges.txt").read_text("utf-8").rstrip("\n").split("\n")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    counts = Counter(character for text in texts for character in text if not character.isascii())
    before = len(vocabulary)
    for character, _ in counts.most_common(CHARACTERS):
        ((written, _),) = byte_level.pre_tokenize_str(character)  # a letter for each byte
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
    """The files that say which ids they have: those from end_of_text on."""
    template = SMALL_PARTS / FOLDER
    config = json.loads((template / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"].values()
    config["added_tokens_decoder"] = {str(end_of_text + n): token for n, token in enumerate(added)}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    generation = json.loads((template / "generation_config.json").read_text())
    generation.update(bos_token_id=end_of_text, eos_token_id=end_of_text)
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2))


def add_rows(weights: dict[str, Tensor], new: int) -> dict[str, Tensor]:
    """Weights of a `TrainedLM` with `new` text ids before its special ones, drawn as it began."""
    found = dict(weights)
    for name, table in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = 0.02 * torch.randn(new, table.shape[1], generator=torch.Generator().manual_seed(0))
            text, special = table[:-SPECIAL_IDS], table[-SPECIAL_IDS:]
            found[name] = torch.cat([text, rows.to(table.dtype), special])
    return found


def grow(path: Path, new: int) -> None:
    """Gives a training file of the language model `new` more text ids."""
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
            training_file(args.work, BEST).unlink(missing_ok=True)  # spoke best before it knew any Mandarin
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
