"""Puts the voice and the GPU memory settings of the repository into wheels, below light_tts, where a server
looks for them. Everything else about the package stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = Path("pretrained_models") / "light-tts-mini", Path("config")
ONLY = shutil.ignore_patterns("__pycache__", "production.yaml*")


class BuildWithFolders(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable installation finds them in the repository
            for folder in FOLDERS:
                target = Path(self.build_lib) / "light_tts" / folder
                shutil.copytree(folder, target, ignore=ONLY, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFolders})
