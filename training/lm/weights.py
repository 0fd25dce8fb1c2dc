"""Selects the language model's weights: those with the fewest errors so far."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import training_file

NAME, BEST = "language_model", "language_model_best"
UNHEARD_STEPS = 3000


def weights_to_use(work: Path) -> Path:
    """Return the file of the best weights, or of the latest average if training has continued for more than
    UNHEARD_STEPS since the last evaluation."""
    latest, best = training_file(work, NAME), training_file(work, BEST)
    if not best.exists():
        return latest
    steps = (torch.load(file, map_location="cpu", weights_only=True)["steps"] for file in (latest, best))
    return best if next(steps) - next(steps) <= UNHEARD_STEPS else latest


def keep_better(path: Path, weights: dict[str, Tensor], errors: float, steps: int) -> bool:
    """Write `weights`, after `steps` of the training, to `path` unless the existing ones have fewer `errors`;
    return whether it did."""
    kept = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    better = kept is None or errors < kept["errors"]
    new = {"model": {"average": weights}, "errors": errors} if better else kept
    unfinished = path.with_suffix(".part")
    torch.save({**new, "steps": steps}, unfinished)
    unfinished.replace(path)
    return better
