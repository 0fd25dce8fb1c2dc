"""The launch configurations that are shipped, and how they are chosen."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from light_tts.kernels import configs
from light_tts.kernels.launch import measured_for_rows, rows_of_tile

FOLDER = Path(configs.__file__).parent
H100, H200 = FOLDER / "NVIDIA_H100_80GB_HBM3.json", FOLDER / "NVIDIA_H200.json"
GPU = torch.device("cuda", 0)


@pytest.fixture
def on_gpu(monkeypatch):
    """-> pretends that the GPU has this name and compute capability"""

    def pretend(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        configs.load.cache_clear()

    yield pretend
    configs.load.cache_clear()


def test_a_gpu_has_its_own_or_those_of_its_kind(on_gpu):
    for name, path in (
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("NVIDIA GH200 480GB", H100),
    ):
        on_gpu(name, (9, 0))
        assert configs.load(GPU) == json.loads(path.read_text())
    on_gpu("NVIDIA A100-SXM4-80GB", (8, 0))
    assert configs.load(GPU) == {}


def test_what_was_measured_is_saved_beside_what_was_known(on_gpu, tmp_path):
    on_gpu("NVIDIA H200", (9, 0))
    known = configs.load(GPU)
    configs.save(GPU, {"fused_rows": 7}, tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text()) == {**known, "fused_rows": 7}


def test_the_smallest_measured_size_that_is_not_below_is_taken(monkeypatch):
    entries = [{"rows": 512, "num_warps": 4}, {"rows": 1024, "num_warps": 8}]
    monkeypatch.setattr(configs, "load", lambda device: {"linear": entries})
    half, single = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    found = [measured_for_rows("linear", half, rows) for rows in (1, 512, 513, 5000)]
    assert found == [{"num_warps": 4}] * 2 + [{"num_warps": 8}] * 2
    assert measured_for_rows("linear", single, 512) is None  # measured with 16 bits a number
    assert measured_for_rows("other", half, 512) is None


def test_ranges_of_rows_are_joined(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
    from tune_flow_overlap import ranges_of

    best = {512: {"a"}, 1024: {"a", "b"}, 2048: set(), 4096: {"b"}}
    assert ranges_of(best) == {"a": [[1, 1024]], "b": [[513, 1024], [2049, 4096]]}


def test_on_an_h200_few_rows_have_whole_blocks_in_one_kernel(on_gpu):
    on_gpu("NVIDIA H200", (9, 0))
    for kernel, expected in (
        ("transformer_block", [16, 16, 32, 32, 32, 32, None]),
        ("resnet_block", [16, 32, 32, 48, 32, None, None]),
    ):
        sizes = (64, 224, 448, 640, 896, 1024, 1025)
        found = [rows_of_tile(kernel, GPU, torch.float16, rows) for rows in sizes]
        assert found == expected
        assert rows_of_tile(kernel, GPU, torch.float32, 64) is None
    on_gpu("NVIDIA H100 80GB HBM3", (9, 0))  # not measured
    assert rows_of_tile("transformer_block", GPU, torch.float16, 64) is None
    assert rows_of_tile("resnet_block", GPU, torch.float16, 64) is None


def test_an_h200_uses_what_was_measured_on_an_h100_for_most_kernels():
    new, known = (json.loads(path.read_text()) for path in (H200, H100))
    changed = {name for name in known if new[name] != known[name]}
    assert changed == {"overlap", "decode_attention"}
    assert {name: new["overlap"][name] for name in known["overlap"]} == known["overlap"]
