"""The `light-tts` command, with one module per subcommand."""

from light_tts.cli.main import main

__all__ = ["main"]
