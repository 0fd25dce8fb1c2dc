"""Compares every stage of the model with golden values and prints a table; exits with 1 if any comparison
fails.

python test/parity.py --golden test/golden             all golden folders in it
python test/parity.py --golden DIR --only flow,hift    some components of one
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from light_tts.models.checkpoint.any_config import YAML_NAMES
from light_tts.tools.parity import Check, Comparison, Golden, MissingGolden, all_checks


@dataclass(frozen=True)
class Row:
    stage: str
    passed: bool
    max_error: float | None = None
    relative_error: float | None = None
    tolerance: float | None = None
    note: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--golden", type=Path, required=True, help="a golden folder, or one that holds some")
    parser.add_argument("--only", help="parts to compare, separated by commas (default: all)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    only = set(args.only.split(",")) if args.only else None
    passed = compared = 0
    for folder in golden_folders(args.golden):
        print(f"{folder}\n{'stage':<44} {'max abs':>10} {'relative':>10} {'tolerance':>10}  result")
        for part, check in all_checks(only):
            for row in run_check(part, check, Golden(folder)):
                print(render(row), flush=True)
                compared += 1
                passed += row.passed
    print(f"{passed} of {compared} passed")
    return 0 if compared and passed == compared else 1


def golden_folders(path: Path) -> list[Path]:
    """Return `path` itself, or the folders in it that contain a checkpoint."""
    folders = [path, *sorted(path.iterdir())] if path.is_dir() else []
    found = [
        folder for folder in folders if any((folder / "checkpoint" / name).is_file() for name in YAML_NAMES)
    ]
    if not found:
        raise SystemExit(f"{path}: no golden folder (one with checkpoint/{' or '.join(YAML_NAMES)}) here")
    return found


def run_check(part: str, check: Check, golden: Golden) -> Iterator[Row]:
    try:
        for comparison in check(golden):
            yield compare(part, comparison)
    except MissingGolden as missing:
        print(f"{part + '.' + check.__name__:<44} skipped: the folder has no {missing}")
    except Exception as error:  # one broken stage must not hide the others
        yield Row(f"{part}.{check.__name__}", False, note=f"{type(error).__name__}: {error}")


def compare(part: str, comparison: Comparison) -> Row:
    stage, tolerance = f"{part}.{comparison.stage}", comparison.tolerance
    got, expected = _array(comparison.got), _array(comparison.expected)
    if got is None or expected is None:
        return Row(stage, bool(comparison.got == comparison.expected), tolerance=tolerance)
    if got.shape != expected.shape:
        return Row(stage, False, tolerance=tolerance, note=f"shape {got.shape}, expected {expected.shape}")
    if not got.size:
        return Row(stage, True, 0.0, 0.0, tolerance)
    with np.errstate(invalid="ignore"):  # inf - inf: equal infinities are not a difference
        difference = np.where(got == expected, 0.0, np.abs(got - expected))
    largest = float(difference.max())
    finite = np.abs(expected[np.isfinite(expected)])
    scale = float(finite.max()) if finite.size else 0.0
    passed = bool(largest <= tolerance)  # False for NaN
    return Row(stage, passed, largest, largest / scale if scale else largest, tolerance)


def _array(value: Any) -> np.ndarray | None:
    """Return the value as float64 numbers, or None if it has no numeric difference."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind in "biuf" else None


def render(row: Row) -> str:
    numbers = "".join(
        f" {number:>10.3g}" if number is not None else f" {'-':>10}"
        for number in (row.max_error, row.relative_error, row.tolerance)
    )
    result = "pass" if row.passed else "FAIL"
    return f"{row.stage:<44}{numbers}  {result}" + (f"  {row.note}" if row.note else "")


if __name__ == "__main__":
    sys.exit(main())
