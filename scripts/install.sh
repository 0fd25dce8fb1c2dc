#!/usr/bin/env bash
# Creates .venv and installs Light-TTS into it, in the tested versions.
#   bash scripts/install.sh           to run the server
#   bash scripts/install.sh test      with the test dependencies ([test] of pyproject.toml; also gpu, trt)
# PYTHON selects an interpreter other than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
extras=${1:+[$1]}

fail() {
    echo "install: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "$python not found; Python 3.10 or newer is needed (or set PYTHON)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; Python 3.10 or newer is needed (or set PYTHON)"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || fail "cannot make .venv (on Debian: apt-get install python3-venv)"
fi
echo "Installing Light-TTS$extras into .venv"
.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".$extras" ||
    fail "pip could not install the packages; its message is above"
