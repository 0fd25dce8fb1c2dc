"""Reads the parameters of a checkpoint of any family. Its YAML file tells which family it is."""

from __future__ import annotations

from pathlib import Path

from light_tts.models.checkpoint import cosyvoice2_config, cosyvoice3_config
from light_tts.models.checkpoint.cosyvoice2_config import Config, load_config
from light_tts.models.checkpoint.cosyvoice3_config import Config3, is_cosyvoice3, load_config3

# of a folder with both, the first counts
YAML_NAMES = (cosyvoice3_config.YAML_NAME, cosyvoice2_config.YAML_NAME)


def load_any_config(model_dir: Path) -> Config | Config3:
    """Read `<model_dir>/cosyvoice3.yaml` or, if there is none, `cosyvoice2.yaml`. Raises ConfigError naming
    the file and the key."""
    return load_config3(model_dir) if is_cosyvoice3(model_dir) else load_config(model_dir)
