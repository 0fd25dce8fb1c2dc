"""Puts the voice that comes with the repository into wheels, below light_tts, where a server looks for it.
Everything else about the package stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

VOICE = Path("pretrained_models") / "light-tts-mini"


class BuildWithVoice(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable installation finds it in the repository
            shutil.copytree(VOICE, Path(self.build_lib) / "light_tts" / VOICE, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithVoice})
