"""Trains the text tokenizer: a byte-level BPE in Qwen2's format.

    python -m training.lm.text_tokenizer [--work build/train_mini]

Needs the sentences. Writes into the checkpoint, unless a tokenizer is there: other ids would not fit a
language model that was trained with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from light_tts.models.frontend.tokenizer import FILES, FOLDER, TextTokenizer
from light_tts.tools.tiny_checkpoint import SMALL_PARTS
from training.checkpoint import END_OF_TEXT, checkpoint_folder, write_config
from training.work import argument_parser, read_lines


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

    config = json.loads((template / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"].values()
    config["added_tokens_decoder"] = {str(END_OF_TEXT + n): token for n, token in enumerate(added)}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    generation = json.loads((template / "generation_config.json").read_text())
    generation.update(bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT)
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2))


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    sentences = [s for s in read_lines(args.work / "sentences.jsonl") if s["split"] == "train"]
    write_config(args.work)
    folder = checkpoint_folder(args.work)
    if not all((folder / FOLDER / name).exists() for name in FILES):
        train_tokenizer((sentence["spoken"] for sentence in sentences), folder)
    tokenizer = TextTokenizer(folder)
    ids = sum(len(tokenizer.encode(sentence["spoken"])) for sentence in sentences[:2000])
    phonemes = sum(len(sentence["phonemes"]) for sentence in sentences[:2000])
    print(f"{len(tokenizer)} text ids, {phonemes / ids:.2f} phonemes for each id of a text")


if __name__ == "__main__":
    main()
