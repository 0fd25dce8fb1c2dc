"""The launch configurations that are shipped, and how they are chosen."""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from light_tts.kernels import configs
from light_tts.kernels.flow.packed_block import fused_queries, most_fused_rows
from light_tts.kernels.launch import measured_for_rows, measured_up_to

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


def test_on_an_h200_few_rows_have_blocks_of_three_launches(on_gpu):
    on_gpu("NVIDIA H200", (9, 0))
    queries = [fused_queries(GPU, torch.float16, rows) for rows in (64, 128, 500, 512, 513, 8192)]
    assert queries == [16] * 4 + [None] * 2
    assert fused_queries(GPU, torch.float16, 64, pages=True) is None  # not measured
    assert most_fused_rows(GPU, torch.float16) == 512
    assert fused_queries(GPU, torch.float32, 64) is None
    on_gpu("NVIDIA H100 80GB HBM3", (9, 0))
    assert fused_queries(GPU, torch.float16, 64) is None and most_fused_rows(GPU, torch.float16) == 0


def test_on_an_h200_more_rows_are_computed_as_on_an_h100():
    """`packed_linear` is used for so few rows only by blocks of three launches."""
    few, many = (json.loads(path.read_text()) for path in (H200, H100))
    changed = {"overlap", "packed_linear_256x1536"}
    assert {name for name in many if few[name] != many[name]} == changed
    assert {name: few["overlap"][name] for name in many["overlap"]} == many["overlap"]
    for found in (few, many):
        found["packed_linear_256x1536"] = [e for e in found["packed_linear_256x1536"] if e["rows"] > 512]
    assert few["packed_linear_256x1536"] == many["packed_linear_256x1536"]
    added = {"overlap"} | set(few) - set(many)
    rows = [entry["rows"] for name in added - {"overlap"} for entry in few[name]]
    assert max(rows) == 512
    new = set(few["overlap"]) - set(many["overlap"])
    assert all(few["overlap"][name] == [[1, 512]] for name in new)


@pytest.fixture
def tune(monkeypatch):
    """-> scripts/tune_flow_blocks.py"""
    monkeypatch.syspath_prepend(FOLDER.parents[2] / "scripts")
    monkeypatch.setattr(configs, "load", configs.load)  # replaced by the script
    return importlib.import_module("tune_flow_blocks")


def a_case(cost):
    """-> in place of a case that measures on a GPU: a step takes as long as `cost` says of the settings"""

    def timer():
        milliseconds = cost(configs.load(GPU))
        return lambda replays: milliseconds

    return SimpleNamespace(bucket=512, timer=timer)


def known() -> dict:
    return json.loads(H100.read_text())


@pytest.mark.parametrize("launches", [3, 5])
@pytest.mark.parametrize("other", [1.5, 0.995])  # slower, and too little faster
def test_what_is_known_stays_if_no_candidate_is_faster(tune, launches, other):
    first = tune.first_settings(known(), 512, launches)
    assert tune.tune(a_case(lambda now: 1.0 if now == first else other), first, launches, math.inf) == first
    if launches == 5:  # exactly what is used on this GPU now
        assert first == tune.pinned(known(), 512)
        assert first | {"fused_block": []} == known() | {"fused_block": []}


@pytest.mark.parametrize("launches", [3, 5])
def test_a_faster_candidate_is_taken(tune, launches):
    first = tune.first_settings(known(), 512, launches)
    kernel, choices = list(tune.candidates(launches, 512))[-1]
    wanted = tune.with_config(first, kernel, choices[-1], 512)
    cost = 1.0

    def of(now):
        return 0.9 if now[kernel] == wanted[kernel] else cost

    assert tune.tune(a_case(of), first, launches, math.inf) == wanted
    assert tune.tune(a_case(of), first, launches, deadline=0.0) == first


def test_what_is_in_use_stays_unless_another_number_of_launches_is_faster(tune):
    assert tune.best_of({"in use": 1.0, "3": 0.995, "5": 1.1}) == "in use"
    assert tune.best_of({"in use": 1.0, "3": 0.98, "5": 0.97}) == "5"


def test_the_best_blocks_are_kept_for_their_rows_and_overlap_there(tune):
    found = known()
    tune.keep(found, tune.pinned(known(), 128), 128)
    chosen = tune.first_settings(known(), 512, 3)
    for kernel, choices in tune.candidates(3, 512):
        chosen = tune.with_config(chosen, kernel, choices[-1], 512)
    for _ in range(2):
        tune.keep(found, chosen, 512)
    five, three = found["fused_block"]
    assert five == {"rows": 128, "launches": 5}
    assert (three["rows"], three["launches"]) == (512, 3)
    for name in (tune.LINEAR, f"{tune.ATTEND}_{three['BLOCK_ROWS']}", tune.FORWARD):
        assert found[name] == chosen[name]
    assert found["overlap"] == known()["overlap"] | {name: [[129, 512]] for name in tune.OVERLAPPING}


def test_what_stays_in_use_for_few_rows_is_not_changed_by_what_is_found_for_more(tune):
    found = known()
    tune.keep(found, tune.pinned(known(), 128), 128)
    better = tune.overlapped(tune.first_settings(known(), 512, 5))
    for kernel, choices in tune.candidates(5, 512):
        better = tune.with_config(better, kernel, choices[0], 512)
    tune.keep(found, better, 512)
    for kernel, choices in tune.candidates(5, 512):
        at = {rows: measured_up_to(found[kernel], rows=rows) for rows in (100, 128, 129, 512, 513)}
        was = {rows: measured_up_to(known()[kernel], rows=rows) for rows in (128, 513)}
        assert at == {100: was[128], 128: was[128], 129: choices[0], 512: choices[0], 513: was[513]}
    assert found["overlap"]["layer_norm_linear"] == [[129, 1024]]


def test_blocks_in_use_are_the_start_on_a_gpu_that_has_been_measured(tune):
    now = json.loads(H200.read_text())
    assert tune.first_settings(now, 512, 3) == tune.pinned(now, 512) == now
    five = tune.first_settings(now, 512, 5)
    assert tune.kernels_of(five, 512) == [tune.QKV, tune.OUT, tune.UP, tune.DOWN]
    assert all(five[name] == now[name] for name in tune.kernels_of(five, 512))
