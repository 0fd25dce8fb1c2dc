"""Every stage agrees with the golden values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TEST = Path(__file__).parent


def run_parity(golden: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TEST / "parity.py"), "--golden", str(golden)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_every_stage_agrees_with_the_golden_values() -> None:
    result = run_parity(TEST / "golden" / "cosyvoice2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout


def test_a_folder_without_golden_values_is_no_success(tmp_path: Path) -> None:
    result = run_parity(tmp_path)
    assert result.returncode == 1
    assert "no golden folder" in result.stderr
