"""The command `light-tts`: one module for each of its subcommands."""

from light_tts.cli.main import main

__all__ = ["main"]
