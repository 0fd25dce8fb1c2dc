"""Number of threads of each stage process: the cores divided by the number of computing processes.

`python -m light_tts.server.supervision.threads` prints the number, for run.sh.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def threads_per_process(processes: int) -> int:
    """Return an equal share of the cores available to this process for each of `processes` concurrent
    ones.
    """
    return max(1, len(os.sched_getaffinity(0)) // processes)


def environment(processes: int, given: Mapping[str, str]) -> dict[str, str]:
    """Return the thread counts as environment variables, except those the operator has set in `given`."""
    share = str(threads_per_process(processes))
    return {name: given.get(name) or share for name in VARIABLES}


def main() -> None:
    from light_tts.server import api_cli
    from light_tts.server.core.settings import SettingsError
    from light_tts.server.core.styles import StyleError, load_styles

    try:
        settings = api_cli.from_environment().settings
        styles = len(load_styles(settings.model_dir))
    except SettingsError as error:
        api_cli.refuse(error)
    except StyleError as error:
        sys.exit(f"light-tts: error: {error}")
    print(threads_per_process(settings.encode_process_num + styles + settings.decode_process_num))


if __name__ == "__main__":
    main()
