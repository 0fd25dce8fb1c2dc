"""Compares every stage of the model with golden values and prints a table; exits with 1 if any comparison
fails. See light_tts/tools/parity/command.py; also runs from a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from light_tts.tools.parity.command import main

if __name__ == "__main__":
    sys.exit(main())
