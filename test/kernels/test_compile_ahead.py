"""Kernels that are compiled before they are launched, in processes with a fake GPU."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from light_tts.kernels import configs

triton = pytest.importorskip("triton")
if not hasattr(triton, "AsyncCompileMode"):
    pytest.skip("this Triton compiles kernels when they are launched", allow_module_level=True)

CONFIGS = sorted(Path(configs.__file__).parent.glob("*.json"))


@dataclass(frozen=True)
class Ended:
    found: dict
    log: str


def run(script: str, cache: Path, *arguments: Path, timeout: float = 120) -> Ended:
    folder = Path(__file__).parents[1] / "support"
    root = folder.parents[1]
    path = os.pathsep.join(map(str, (folder.parent, root, root / "scripts")))
    settings = {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    environment.pop("TRITON_INTERPRET", None)
    ended = subprocess.run(
        [sys.executable, str(folder / script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ended.returncode == 0, ended.stderr
    return Ended(json.loads(ended.stdout), ended.stderr)


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run("rehearsals.py", tmp_path_factory.mktemp("triton"))


def counted(compiled: list[str], launched: list[str]) -> dict[str, list[str]]:
    return {"compiled": compiled, "launched": launched}


def test_a_rehearsal_compiles_each_kernel_once_and_launches_none_not_even_a_known_one(rehearsals):
    assert rehearsals.found["known"] == counted(["add"], ["add"])
    assert rehearsals.found["rehearsal"] == counted(["add"] * 3 + ["scale"] * 3, [])


def test_launches_find_what_was_compiled(rehearsals):
    assert rehearsals.found["launches"] == counted([], ["add"] * 8 + ["scale"] * 6)
    assert rehearsals.found["second rehearsal"] == counted([], [])


def test_a_kernel_that_cannot_be_compiled_is_reported_and_the_others_are_ready(rehearsals):
    assert "this one cannot be compiled" in rehearsals.found["error"]
    assert rehearsals.found["with an error"] == counted(["scale"], ["scale"])


def test_kernels_in_cuda_cpp_are_compiled_once_too(rehearsals):
    assert rehearsals.found["in CUDA C++"] == counted(["right"], [])
    assert rehearsals.found["error in CUDA C++"] == "nor can this one"
    assert rehearsals.found["in CUDA C++, with an error"] == counted(["another"], [])


def test_without_a_gpu_nothing_is_rehearsed(rehearsals):
    assert rehearsals.found["without a GPU"] == counted([], [])


def test_who_waits_sees_progress(rehearsals):
    assert re.search(r"^compiling kernels: \d of 6$", rehearsals.log, re.MULTILINE)
    assert rehearsals.log.count("compiled or found 6 kernels in ") == 1


def test_rehearsals_of_the_models_leave_nothing_to_be_compiled(tmp_path):
    found = run("warm_ups.py", tmp_path).found
    for rehearsal, afterwards in zip(found["rehearsals"], found["afterwards"], strict=True):
        assert rehearsal["compiled"] and not rehearsal["launched"]
        assert afterwards["launched"] and not afterwards["compiled"]
    unet, dit, vocoder, causal, llm = (set(rehearsal["compiled"]) for rehearsal in found["rehearsals"])
    assert {"_packed_attention_kernel", "_layer_norm_linear_kernel"} <= unet
    assert {"_packed_attention_kernel", "_grouped_conv_kernel", "_repeat_rows_kernel"} <= dit
    assert "_convolve_kernel" in vocoder
    assert {"_causal_phase_kernel", "_causal_samples_kernel"} <= causal
    assert {"_prefill_kernel", "_decode_kernel", "_sample_kernel"} <= llm


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("measured", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_all_kernels_of_the_full_size_can_be_compiled_and_fit_on_the_gpu(measured, tmp_path_factory):
    """With the configurations measured there: none needs more shared memory than a block can have."""
    cache = tmp_path_factory.getbasetemp() / "full size"  # the same for all GPUs
    compiled = run("full_size_warm_ups.py", cache, measured, timeout=1100).found
    assert sum(compiled.values()) > 150
    needed = {
        "_packed_conv_kernel",
        "_grouped_conv_kernel",
        "_modulated_norm_kernel",
        "_convolve_kernel",
        "_causal_phase_kernel",
        "_causal_samples_kernel",
        "_row_linear_kernel",
        "_prefill_kernel",
        "_decode_kernel",
    }
    assert needed <= set(compiled)
