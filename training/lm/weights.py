"""Which weights of the language model are used: those that spoke best, of all that have been heard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import training_file

NAME, BEST = "language_model", "language_model_best"
UNHEARD_STEPS = 3000


def weights_to_use(work: Path) -> Path:
    """The file of the weights that spoke best, or of the latest average where the training went on for more
    than UNHEARD_STEPS since any have been heard."""
    latest, best = training_file(work, NAME), training_file(work, BEST)
    if not best.exists():
        return latest
    steps = (torch.load(file, map_location="cpu", weights_only=True)["steps"] for file in (latest, best))
    return best if next(steps) - next(steps) <= UNHEARD_STEPS else latest


def keep_better(path: Path, weights: dict[str, Tensor], errors: float, steps: int) -> bool:
    """Writes `weights`, after `steps` of the training, to `path` unless those there made fewer `errors`. ->
    whether it did"""
    kept = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    better = kept is None or errors < kept["errors"]
    new = {"model": {"average": weights}, "errors": errors} if better else kept
    unfinished = path.with_suffix(".part")
    torch.save({**new, "steps": steps}, unfinished)
    unfinished.replace(path)
    return better
