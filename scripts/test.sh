#!/usr/bin/env bash
# The second command: installs what the tests need into .venv and runs all of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh test
# Small models run fastest on one thread, and the tests' servers share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Tests with servers mostly wait: two at a time. A file stays on one worker, with the servers it has started.
.venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
