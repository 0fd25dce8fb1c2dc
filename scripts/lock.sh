#!/usr/bin/env bash
# Writes constraints.txt: a release of each package that pyproject.toml needs, directly or not, with all extras but
# [agents] (its packages want others), for Python 3.10 and newer. Pins stay as long as they satisfy pyproject.toml;
# --upgrade takes the newest, --upgrade-package NAME that of one. Needs uv: pip install uv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=()
for name in test gpu trt ray otel evaluate evaluate-zh train bench deploy browser; do
    extras+=(--extra "$name")
done
uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header "${extras[@]}" "$@" \
    pyproject.toml --output-file constraints.txt
pins=$(cat constraints.txt)
cat > constraints.txt <<END
# What was tested, written by scripts/lock.sh. Use: pip install -c constraints.txt -e '.[test]'
$pins
# Installed without their dependencies, for scripts/evaluate.py
distillmos==0.9.1
resemblyzer==0.1.4
xls-r-sqa==0.1.0
END
