"""The checkpoint bundled with Light-TTS, used unless --model_dir names another.

`python -m light_tts.server.core.default_checkpoint` prints its directory, for scripts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from light_tts.server.core.settings import SettingsError

NAME = "light-tts-mini"
PACKAGE = Path(__file__).parents[2]
PLACES = tuple(
    base / "pretrained_models" / NAME for base in (PACKAGE, PACKAGE.parent)
)  # in an installed wheel, in the repository


def default_checkpoint() -> Path:
    """Return the directory of the bundled checkpoint. Raises SettingsError if it is missing."""
    for place in PLACES:
        if (place / "cosyvoice2.yaml").exists():
            return place
    raise SettingsError(
        "--model_dir is missing, and the voice that comes with Light-TTS is in neither of "
        f"{' and '.join(map(str, PLACES))}: get it from pretrained_models/{NAME} of the repository or from a "
        "wheel that was built there, or give the directory of a checkpoint"
    )


if __name__ == "__main__":
    try:
        print(default_checkpoint())
    except SettingsError as error:
        sys.exit(f"light-tts: error: {error}")
