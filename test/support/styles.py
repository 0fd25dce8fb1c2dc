"""Checkpoints with several styles, which are copies of the small one's LLM with other stop ids."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support.server_process import CHECKPOINT

NEVER, AT_ONCE = -1e3, 1e3
# Style: biases of eos and of the other two stop ids; none: those of the checkpoint.
STYLES = {
    "plain": None,
    "ending": (AT_ONCE, NEVER, NEVER),  # says eos as soon as it may
    "stopping": (NEVER, 5.5, NEVER),  # comes upon another stop id now and then
    "shy": (13.0, NEVER, NEVER),  # says eos at once about every other time
}


def checkpoint_with(*styles: str, folder: Path) -> Path:
    """Make `folder` a checkpoint with these of STYLES, in this order, and return it."""
    for path in CHECKPOINT.iterdir():
        (folder / path.name).symlink_to(path)
    weights = torch.load(CHECKPOINT / "llm.pt", weights_only=True)
    entries = []
    for style in styles:
        file = "llm.pt"
        if biases := STYLES[style]:
            file = f"{style}.pt"
            changed = weights["llm_decoder.bias"].clone()
            changed[-3:] = torch.tensor(biases)
            torch.save({**weights, "llm_decoder.bias": changed}, folder / file)
        entries.append({"style_name": style, "llm_path": file})
    (folder / "style_config.json").write_text(json.dumps({"lora_info": entries}))
    return folder
