"""The compilers are prepared in a thread while a process imports PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest


def output(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    return ended.stdout


def test_triton_has_identified_itself_before_torch_is_imported():
    pytest.importorskip("triton")
    found = output(
        "import sys\n"
        "from light_tts.kernels import compilers\n"
        "compilers.prepare()\n"
        "compilers.prepare()\n"
        "compilers.wait()\n"
        "from triton.runtime.cache import triton_key\n"
        "print('torch' in sys.modules, triton_key.cache_info().currsize)\n"
    )
    assert found == "False 1\n"


@pytest.mark.parametrize("prepare", ["compilers.prepare()", ""])
def test_a_process_without_triton_or_without_preparation_does_not_wait(prepare: str):
    code = f"""
import sys
sys.modules["triton"] = None
from light_tts.kernels import compilers
{prepare}
compilers.wait()
print("goes on")
"""
    assert output(code) == "goes on\n"
