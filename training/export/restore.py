"""Recreates training files from the checkpoint in the repository, so that its trainings can be resumed.

    python -m training.export.restore [--checkpoint FOLDER] [--work build/train_mini]

A checkpoint does not contain the vocoder's discriminators and the language model's phoneme tables; those are
in unserved.pt (`--save` writes it from the training files in the work folder). The text tokenizer is copied
with the rest of the checkpoint and must not be changed. The speech tokenizer and the speaker encoder are
trained before everything else and are not restored.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import checkpoint_folder, halves, training_file
from training.lm.weights import weights_to_use
from training.work import argument_parser

UNSERVED = Path(__file__).parents[1] / "unserved.pt"
TRAININGS = {"language_model": ("llm.pt", "lm."), "flow": ("flow.pt", ""), "vocoder": ("hift.pt", "")}


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def learner(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights in the format of `training.Learner`."""
    return {"model": weights, "average": weights}


def restore(checkpoint: Path, work: Path) -> None:
    """Write the checkpoint folder and the training files of `work`."""
    unserved = read(UNSERVED)
    shutil.copytree(checkpoint, checkpoint_folder(work), dirs_exist_ok=True)
    for name, (file, prefix) in TRAININGS.items():
        own = {prefix + key: weight for key, weight in read(checkpoint / file).items()}
        rest = unserved[name]
        model = "flow" if name == "flow" else "model"
        state = {model: learner(own | rest["weights"])}
        if name == "vocoder":
            state["discriminators"] = learner(rest["discriminators"])
        torch.save({**state, "minutes": rest["minutes"], "steps": rest["steps"]}, training_file(work, name))
        print(f"{training_file(work, name)}: {rest['steps']} steps in {rest['minutes']:.1f} minutes")


def save(work: Path) -> None:
    """Write what the exported checkpoint lacks, in half precision."""
    found = {}
    for name in TRAININGS:
        state = read(training_file(work, name))
        found[name] = {"weights": {}, "minutes": state["minutes"], "steps": state["steps"]}
    lm = read(weights_to_use(work))["model"]["average"]
    found["language_model"]["weights"] = halves({k: w for k, w in lm.items() if not k.startswith("lm.")})
    discriminators = read(training_file(work, "vocoder"))["discriminators"]["average"]
    found["vocoder"]["discriminators"] = halves(discriminators)
    torch.save(found, UNSERVED)
    print(f"{UNSERVED}: {UNSERVED.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("pretrained_models/light-tts-mini"))
    parser.add_argument("--save", action="store_true", help="write unserved.pt")
    args = parser.parse_args()
    if args.save:
        save(args.work)
    else:
        restore(args.checkpoint, args.work)


if __name__ == "__main__":
    main()
