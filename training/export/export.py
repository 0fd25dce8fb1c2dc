"""Assembles the trained components into a checkpoint in the real file formats.

    python -m training.export.export [--work build/train_mini] [--out pretrained_models/light-tts-mini]

Writes WORK/checkpoint and copies it to --out, whose README.md (the model card) is left unchanged.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from training.checkpoint import checkpoint_folder, write_config
from training.codec import speaker_encoder, speech_tokenizer
from training.flow import flow_matching
from training.lm import language_model
from training.vocoder import vocoder
from training.work import argument_parser

LARGEST = 45e6  # bytes, because it is stored in the repository
PARTS = (speech_tokenizer, speaker_encoder, language_model, flow_matching, vocoder)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("pretrained_models/light-tts-mini"))
    args = parser.parse_args()
    write_config(args.work)
    for part in PARTS:
        part.export(args.work)
    # a separate process, which reads the written files like the server
    voices = [sys.executable, "-m", "training.export.voices", "--work", args.work]
    if subprocess.run(voices).returncode:
        sys.exit("training.export.voices failed; its message is above")
    folder = checkpoint_folder(args.work)
    shutil.copytree(folder, args.out, dirs_exist_ok=True)
    sizes = {
        file.relative_to(args.out): file.stat().st_size for file in args.out.rglob("*") if file.is_file()
    }
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.2f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total / 1e6:8.2f} MB  {args.out}")
    if total > LARGEST:
        sys.exit(f"more than {LARGEST / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
