"""Training files of the checkpoint that lies in the repository, so that its trainings can go on.

    python -m training.export.restore [--checkpoint FOLDER] [--work build/train_mini]

A checkpoint has no judges of the vocoder and no phonemes of the language model; those are in unserved.pt
beside this file (`--save` writes it from the training files in the work folder). The text tokenizer is copied
with the rest of the checkpoint, which must go on being used. The speech tokenizer and the speaker encoder are
trained before all else and are not restored.
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
    """As `training.Learner` keeps it."""
    return {"model": weights, "average": weights}


def restore(checkpoint: Path, work: Path) -> None:
    """Writes the checkpoint folder and the training files of `work`."""
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
    """Writes what the exported checkpoint lacks, in half precision."""
    found = {}
    for name in TRAININGS:
        state = read(training_file(work, name))
        found[name] = {"weights": {}, "minutes": state["minutes"], "steps": state["steps"]}
    lm = read(weights_to_use(work))["model"]["average"]
    found["language_model"]["weights"] = halves({k: w for k, w in lm.items() if not k.startswith("lm.")})
    judges = read(training_file(work, "vocoder"))["discriminators"]["average"]
    found["vocoder"]["discriminators"] = halves(judges)
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
