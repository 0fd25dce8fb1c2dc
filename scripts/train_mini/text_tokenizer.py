"""What the language model reads: texts as the server normalises them, and the text tokenizer.

    python scripts/train_mini/text_tokenizer.py [--work build/train_mini]

Writes texts.jsonl in the work folder, {"written", "spoken"} for each text that the server would change: with
wetext, in some two minutes; unless the file is there, so that a machine without wetext can take it as it is
(remove it after new sentences). Then trains a byte-level BPE in Qwen2's format into the checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from checkpoint import END_OF_TEXT, checkpoint_folder, write_config
from make_tiny_checkpoint import SMALL_PARTS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from work import argument_parser, lines_to, read_lines

from light_tts.models.cosyvoice2.frontend.text import TextNormalizer
from light_tts.models.cosyvoice2.frontend.tokenizer import FOLDER, TextTokenizer

FILE_NAME = "texts.jsonl"


@dataclass(frozen=True)
class Text:
    """`spoken`: what the language model gets for `written`."""

    written: str
    spoken: str


def write_texts(work: Path) -> None:
    """Normalises all sentences and utterances."""
    normalizer = TextNormalizer(count_tokens=len)
    written = {
        line["text"] for name in ("sentences", "utterances") for line in read_lines(work / f"{name}.jsonl")
    }
    with lines_to(work / FILE_NAME) as write:
        for text in sorted(written):
            # In one piece: the server divides only what is longer than all that is trained on.
            spoken = "".join(normalizer.split(text))
            if spoken != text:
                write(Text(text, spoken))


def spoken_texts(work: Path) -> dict[str, str]:
    """What is spoken for what is written; without those texts that stay as they are."""
    return {line["written"]: line["spoken"] for line in read_lines(work / FILE_NAME)}


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
    if not (args.work / FILE_NAME).exists():
        if importlib.util.find_spec("wetext") is None:
            sys.exit("wetext is not installed, without which the texts would stay as they are written")
        begun = time.monotonic()
        write_texts(args.work)
        print(f"{args.work / FILE_NAME}: {time.monotonic() - begun:.0f} s", flush=True)
    spoken = spoken_texts(args.work)
    sentences = read_lines(args.work / "sentences.jsonl")
    texts = [spoken.get(s["text"], s["text"]) for s in sentences if s["split"] == "train"]
    write_config(args.work)
    train_tokenizer(texts, checkpoint_folder(args.work))
    tokenizer = TextTokenizer(checkpoint_folder(args.work))
    ids = sum(len(tokenizer.encode(text)) for text in texts[:2000])
    phonemes = sum(len(s["phonemes"]) for s in [s for s in sentences if s["split"] == "train"][:2000])
    print(f"{len(tokenizer)} text ids, {phonemes / ids:.2f} phonemes for each id of a text")


if __name__ == "__main__":
    main()
