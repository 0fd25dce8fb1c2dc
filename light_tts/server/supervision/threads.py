"""How many threads each stage process may use: the cores there are, divided by the processes that compute.

`python -m light_tts.server.supervision.threads` prints the number for run.sh's settings.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def threads_per_process(processes: int) -> int:
    """Each of `processes` that compute at once gets an equal share of the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def environment(processes: int, given: Mapping[str, str]) -> dict[str, str]:
    """The thread counts as environment variables; what the operator has set in `given` stays."""
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
