"""Every stage agrees with the golden values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TEST = Path(__file__).parents[1]


def run_parity(golden: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TEST / "parity.py"), "--golden", str(golden), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(("family", "comparisons"), [("cosyvoice2", 200), ("cosyvoice3", 140)])
def test_every_stage_agrees_with_the_golden_values(family: str, comparisons: int) -> None:
    result = run_parity(TEST / "golden" / family)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout and result.stdout.count("  pass") >= comparisons


def test_a_wrong_value_fails_by_name(tmp_path: Path) -> None:
    golden = TEST / "golden" / "cosyvoice2"
    (tmp_path / "checkpoint").symlink_to(golden / "checkpoint")
    arrays = dict(np.load(golden / "flow.npz"))
    arrays["mu"] = arrays["mu"] + 2e-4
    arrays["enc_full"] = arrays["enc_full"][:, 1:]
    arrays["t_span"] = np.full_like(arrays["t_span"], np.nan)
    np.savez(tmp_path / "flow.npz", **arrays)
    result = run_parity(tmp_path, "--only", "flow")
    assert result.returncode == 1, result.stdout + result.stderr
    failed = {line.split()[0] for line in result.stdout.splitlines() if "FAIL" in line}
    assert failed >= {"flow.mu", "flow.enc_full", "flow.t_span"}
    assert "flow.pos_emb_57" not in failed


def test_a_folder_without_golden_values_is_no_success(tmp_path: Path) -> None:
    result = run_parity(tmp_path)
    assert result.returncode == 1
    assert "no golden folder" in result.stderr
