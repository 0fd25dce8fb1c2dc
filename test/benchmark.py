"""Load generator: sends requests to a running server and prints how fast the responses arrived. See
light_tts/tools/bench/command.py; also runs from a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from light_tts.tools.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
