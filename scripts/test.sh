#!/usr/bin/env bash
# Installs the test dependencies into .venv and runs the tests. NIGHTLY=1: also those that take
# minutes, see the marker `nightly` in pyproject.toml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# pip would compile all packages on one core; half of that are modules that are never imported.
PIP_COMPILE=0 bash scripts/install.sh test
unused='/(models|networkx|numba|pip|scipy|sklearn|sympy)/'
.venv/bin/python -m compileall -qq -j 2 -x "$unused" .venv/lib || true # some are no Python
unset PYTHONDONTWRITEBYTECODE # what else is imported is compiled once
# Small models run fastest on one thread, and the tests' servers share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
# Its one process uses less time than two that work together, beside tests that also wait.
nice .venv/bin/mypy &
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
tests() {
    .venv/bin/python -m pytest "$@" || [ $? -eq 5 ] # 5: there is none of this kind among those asked for
}
# Three workers for the two cores of a small machine, as tests also wait (TEST_WORKERS=0: none). A file stays
# on one of them, with the servers that it has started.
often="${NIGHTLY:+nightly or }not nightly"
tests -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder -m "not alone and ($often)" "$@"
wait "$types"
tests -m "alone and ($often)" "$@"
