"""The estimator as an ONNX graph (against PyTorch and the reference values) and the TensorRT path around it,
with a fake of the tensorrt package (see fake_tensorrt.py): TensorRT itself has not been run."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from support import fake_tensorrt

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.flow.estimator_backend import TorchEstimator, choose_estimator
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.masks import EstimatorMasks
from light_tts.models.flow.trt import engine as estimator_trt
from light_tts.models.flow.trt import onnx_graph as estimator_onnx
from light_tts.models.flow.trt import plan as estimator_plan
from light_tts.models.flow.trt.engine import TensorRtEstimator
from light_tts.models.flow.unet.estimator import Estimator

GOLDEN = Path(__file__).parents[1] / "golden" / "cosyvoice2"
CHECKPOINT = GOLDEN / "checkpoint"
CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}  # of the largest value; seen: 2e-7 and 9e-4
GOLDEN_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3}


def load_flow() -> Flow:
    return Flow.from_checkpoint(CHECKPOINT, load_config(CHECKPOINT), torch.device("cpu"))


@pytest.fixture(scope="module")
def module() -> Estimator:
    return load_flow().decoder.estimator


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["float32", "float16"])
def exported(request) -> tuple[Estimator, onnxruntime.InferenceSession]:
    module = load_flow().decoder.estimator.to(request.param)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    session = onnxruntime.InferenceSession(estimator_onnx.export(module))
    assert all(
        torch.equal(value, before[name]) and value.dtype == before[name].dtype
        for name, value in module.state_dict().items()
    ), "the module stays as it is"
    return module, session


def golden(name: str) -> torch.Tensor:
    with np.load(GOLDEN / "flow.npz") as arrays:
        return torch.from_numpy(arrays[name])


def run(session: onnxruntime.InferenceSession, values: tuple) -> torch.Tensor:
    feed = {name: value.numpy() for name, value in estimator_onnx.graph_inputs(*values).items()}
    return torch.from_numpy(session.run(None, feed)[0])


def arguments(lengths: list[int], chunk: int | None, dtype: torch.dtype, seed: int = 1) -> tuple:
    """Random arguments of `Estimator.forward`; the padding is not zero."""
    generator = torch.Generator().manual_seed(seed)
    batch, size = len(lengths), max(lengths)
    x, mu, cond = torch.randn(3, batch, 80, size, generator=generator).to(dtype)
    spks = torch.randn(batch, 80, generator=generator).to(dtype)
    t = torch.rand(batch, generator=generator).to(dtype)
    return x, EstimatorMasks.build(torch.tensor(lengths), size, chunk, dtype), mu, t, spks, cond


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error as a fraction of the largest expected value."""
    return float((value.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("lengths", [[20], [13, 20, 7], [2, 2], [9, 5, 9, 1]])
def test_graph_is_the_module(exported, lengths: list[int], chunk: int | None):
    module, session = exported
    dtype = module.final_proj.weight.dtype
    values = arguments(lengths, chunk, dtype)
    with torch.inference_mode():
        expected = module(*values)
    shapes = {name: tuple(value.shape) for name, value in estimator_onnx.graph_inputs(*values).items()}
    assert shapes == estimator_onnx.input_shapes(80, len(lengths), max(lengths))
    got = run(session, values)
    assert got.dtype == expected.dtype
    assert difference(got, expected) < TOLERANCE[dtype]


def test_graph_gives_the_reference_values_with_either_mask(exported):
    """Guided and unguided row at once, and the chunk mask, which the checkpoint's own ONNX file ignores."""
    module, session = exported
    dtype, chunk = module.final_proj.weight.dtype, load_flow().decoder.chunk_size
    mu, spks, cond = (
        torch.cat([value, torch.zeros_like(value)]).to(dtype)
        for value in (golden(name) for name in ("mu", "spk_affine", "est_cond"))
    )
    x, t = golden("est_x").expand(2, -1, -1).to(dtype), golden("est_t")
    for mode, size in (("full", None), ("stream", chunk)):
        masks = EstimatorMasks.build(torch.tensor([x.shape[2]]), x.shape[2], size, dtype, copies=2)
        got = run(session, (x, masks, mu, t, spks, cond))
        assert difference(got, golden(f"est_out_{mode}")) < GOLDEN_TOLERANCE[dtype]
    assert difference(golden("est_out_full"), golden("est_out_stream")) > 1e-2


def test_half_precision_keeps_float32_between_the_products(exported):
    module, _ = exported
    if module.final_proj.weight.dtype != torch.float16:
        pytest.skip("about float16")
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(estimator_onnx.export(module))).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds |= {weight.name: weight.data_type for weight in graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT

    def kinds_of(operation: str) -> set[int]:
        return {kinds.get(node.input[0]) for node in graph.node if node.op_type == operation}

    for operation in ("LayerNormalization", "Softmax", "Softplus", "Erf", "Sin"):
        assert kinds_of(operation) == {single}, operation
    assert kinds_of("Conv") == {half}
    assert half in kinds_of("MatMul")


def test_graph_has_only_common_operations(exported):
    """All in the support matrix of TensorRT's parser, none that computes shapes in a roundabout way."""
    import onnx

    module, _ = exported
    known = (
        "Add Cast Concat Constant ConstantOfShape Conv Cos Div Equal Erf Expand Gather Gemm "
        "LayerNormalization MatMul Mul Reshape Shape Sigmoid Sin Slice Softmax Softplus Tanh Transpose "
        "Unsqueeze Where"
    )
    graph = onnx.load_from_string(estimator_onnx.export(module)).graph
    assert {node.op_type for node in graph.node} <= set(known.split())


def test_script_writes_the_graph(tmp_path: Path):
    out = tmp_path / "estimator.onnx"
    command = [sys.executable, str(GOLDEN.parents[2] / "scripts" / "export_estimator.py")]
    command += ["--model_dir", str(CHECKPOINT), "--out", str(out), "--data_type", "float16"]
    subprocess.run(command, check=True, timeout=100)
    [x, *_] = onnxruntime.InferenceSession(out).get_inputs()
    assert (x.name, x.type) == ("x", "tensor(float16)")


# -- TensorRT, pretended

real_export = estimator_onnx.export
exported_before: dict[str, bytes] = {}


def export_once(module: Estimator) -> bytes:
    """Spares the tests most of their time."""
    digest = estimator_plan._digest(module)
    if digest not in exported_before:
        exported_before[digest] = real_export(module)
    return exported_before[digest]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A machine with TensorRT and a GPU, whose tensors are on the CPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module())
    monkeypatch.setattr(estimator_onnx, "export", export_once)
    monkeypatch.setattr(fake_tensorrt.Builder, "builds", [])
    seen = SimpleNamespace(stream=7, recorded=[])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=seen.stream))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Pretence 80GB (SXM)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: seen.recorded.append(stream), raising=False
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen.model_dir = tmp_path / "model"
    seen.model_dir.mkdir()
    yield seen


def plans(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.plan"))


def test_engine_serves_like_the_module(trt, module: Estimator, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        backend = choose_estimator(module, True, CUDA, trt.model_dir, max_batch_size=3)
    assert isinstance(backend, TensorRtEstimator)
    assert "using a TensorRT engine" in caplog.text
    for lengths, chunk in (([20, 20], None), ([13, 20, 7, 13, 20, 7], 6)):
        values = arguments(lengths, chunk, torch.float32)
        with torch.inference_mode():
            assert difference(backend(*values), module(*values)) < TOLERANCE[torch.float32]
    assert trt.recorded, "inputs made on another stream live until this one has used them"


def test_flow_with_an_engine_gives_the_reference_mel(trt):
    flow = load_flow()
    flow.decoder.backend = choose_estimator(flow.decoder.estimator, True, CUDA, trt.model_dir)
    mu, spks, cond = (golden(name) for name in ("mu", "spk_affine", "est_cond"))
    for mode, streaming in (("full", False), ("stream", True)):
        with torch.inference_mode():
            mel = flow.decoder(mu, torch.tensor([mu.shape[2]]), spks, cond, streaming)
        assert difference(mel, golden(f"cfm_out_{mode}")) < GOLDEN_TOLERANCE[torch.float32]


def test_inputs_need_not_be_contiguous(trt, module: Estimator):
    backend = choose_estimator(module, True, CUDA, trt.model_dir)
    x, masks, mu, t, spks, cond = arguments([20, 11], 6, torch.float32)
    turned = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in (x, mu, cond)]
    with torch.inference_mode():
        got = backend(turned[0], masks, turned[1], t, spks, turned[2])
        assert difference(got, module(x, masks, mu, t, spks, cond)) < TOLERANCE[torch.float32]


def test_sizes_beyond_the_engine_are_computed_by_the_module(trt, module: Estimator):
    backend = choose_estimator(module, True, CUDA, trt.model_dir, max_batch_size=1)
    [context] = backend._engine.contexts
    calls = len(context.streams)
    for lengths in ([8, 8, 8, 8], [9], [3001, 3001]):
        if max(lengths) > 3000:
            backend._module = lambda x, *rest: x  # too slow to compute here
        values = arguments(lengths, None, torch.float32)
        with torch.inference_mode():
            assert backend(*values).shape == values[0].shape
    assert len(context.streams) == calls


def test_each_thread_and_stream_has_a_context(trt, module: Estimator):
    backend = choose_estimator(module, True, CUDA, trt.model_dir)
    values = arguments([8, 8], None, torch.float32)

    @torch.inference_mode()
    def call() -> None:
        backend(*values)

    call()
    trt.stream = 8
    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert [set(context.streams) for context in backend._engine.contexts] == [{7}, {8}, {8}]


def test_network_is_strongly_typed_with_the_profile_of_the_batch(trt, module: Estimator):
    choose_estimator(module, True, CUDA, trt.model_dir, max_batch_size=4)
    [(network, config)] = fake_tensorrt.Builder.builds
    assert network.flags == 1 << int(fake_tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    [profile] = config.profiles
    assert set(profile.shapes) == set(estimator_onnx.INPUTS)
    assert profile.shapes["x"] == [(2, 80, 2), (8, 80, 600), (8, 80, 3000)]
    assert profile.shapes["attention"][2] == (8, 1, 3000, 3000)
    assert config.max_aux_streams == 0


def test_plan_is_kept_and_named_by_all_that_it_depends_on(trt, module: Estimator):
    choose_estimator(module, True, CUDA, trt.model_dir, max_batch_size=2)
    choose_estimator(module, True, CUDA, trt.model_dir, max_batch_size=2)
    assert len(fake_tensorrt.Builder.builds) == 1
    [plan] = plans(trt.model_dir)
    head, _, digest = plan.name.removesuffix(".plan").rpartition(".")
    assert head == "flow.estimator.NVIDIA-Pretence-80GB-SXM.sm90.trt10.9.0.34.float32.b4.f3000"
    assert len(digest) == 12 and plan.stat().st_mode & 0o777 == 0o644

    other = load_flow().decoder.estimator
    with torch.no_grad():
        other.final_proj.bias += 1
    choose_estimator(other, True, CUDA, trt.model_dir, max_batch_size=2)
    choose_estimator(module, True, CUDA, trt.model_dir, max_batch_size=1)
    assert len(plans(trt.model_dir)) == 3
    assert [path.suffix for path in trt.model_dir.iterdir() if path.suffix not in (".plan", ".lock")] == []


def test_plan_lies_in_the_cache_where_the_checkpoint_is_read_only(trt, module, monkeypatch, tmp_path):
    real = estimator_plan.tempfile.TemporaryFile

    def temporary_file(dir: Path) -> object:
        if dir == trt.model_dir:
            raise PermissionError(dir)
        return real(dir=dir)

    monkeypatch.setattr(estimator_plan.tempfile, "TemporaryFile", temporary_file)
    for _ in range(2):
        assert isinstance(choose_estimator(module, True, CUDA, trt.model_dir), TensorRtEstimator)
    assert plans(trt.model_dir) == []
    assert len(plans(tmp_path / "cache" / "light_tts")) == len(fake_tensorrt.Builder.builds) == 1


def test_plan_that_cannot_be_read_is_built_again(trt, module: Estimator, caplog):
    choose_estimator(module, True, CUDA, trt.model_dir)
    [plan] = plans(trt.model_dir)
    plan.write_bytes(b"half a file")
    assert isinstance(choose_estimator(module, True, CUDA, trt.model_dir), TensorRtEstimator)
    assert len(fake_tensorrt.Builder.builds) == 2
    assert "cannot be read" in caplog.text
    assert plan.read_bytes().startswith(fake_tensorrt.PLAN)


def test_of_two_that_start_at_once_one_builds(trt, module: Estimator, monkeypatch, caplog):
    building, go_on = threading.Event(), threading.Event()
    build = fake_tensorrt.Builder.build_serialized_network

    def slow_build(*args: object) -> bytes | None:
        building.set()
        assert go_on.wait(10)
        return build(*args)

    monkeypatch.setattr(fake_tensorrt.Builder, "build_serialized_network", slow_build)
    backends = []
    threads = [
        threading.Thread(target=lambda: backends.append(choose_estimator(module, True, CUDA, trt.model_dir)))
        for _ in range(2)
    ]
    with caplog.at_level(logging.INFO):
        threads[0].start()
        assert building.wait(20)
        threads[1].start()
        deadline = threading.Event()
        for _ in range(200):
            if "waiting for it" in caplog.text:
                break
            deadline.wait(0.05)
        go_on.set()
        for thread in threads:
            thread.join(30)
    assert "another process is building the engine; waiting for it" in caplog.text
    assert [type(backend) for backend in backends] == [TensorRtEstimator] * 2
    assert len(fake_tensorrt.Builder.builds) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("parser", "TensorRtError: TensorRT cannot parse the ONNX graph: In node 7: no importer"),
        ("builder", "TensorRtError: the engine cannot be built: no tactic fits"),
        ("export", "RuntimeError: the exporter does not know this"),
        ("results", "TensorRtError: the engine's results differ from the module's by"),
        ("nan", "TensorRtError: the engine's results differ from the module's by nan"),
        ("disk", "OSError: [Errno 28] no space left"),
    ],
)
def test_any_failure_leaves_the_built_in_path_and_one_line(trt, module, monkeypatch, caplog, fault, reason):
    def fail(error: Exception) -> object:
        def function(*args: object) -> None:
            raise error

        return function

    if fault == "parser":
        monkeypatch.setattr(fake_tensorrt.OnnxParser, "refuses", True)
    elif fault == "builder":
        monkeypatch.setattr(fake_tensorrt.Builder, "fails", True)
    elif fault == "export":
        monkeypatch.setattr(estimator_onnx, "export", fail(RuntimeError("the exporter\ndoes not know this")))
    elif fault == "disk":
        monkeypatch.setattr(estimator_plan.os, "replace", fail(OSError(28, "no space left")))
    else:
        wrong = 0.5 if fault == "results" else float("nan")
        monkeypatch.setattr(fake_tensorrt.Context, "wrong_by", wrong)
    with caplog.at_level(logging.WARNING, "light_tts.models.flow.estimator_backend"):
        backend = choose_estimator(module, True, CUDA, trt.model_dir)
    assert isinstance(backend, TorchEstimator)
    lines = [record.getMessage() for record in caplog.records if "estimator_backend" in record.name]
    assert len(lines) == 1 and lines[0].startswith(f"load_trt: {reason}")
    assert lines[0].endswith("; using the built-in flow estimator")
    if fault in ("builder", "disk"):
        assert [path.name for path in trt.model_dir.iterdir() if path.suffix != ".lock"] == []


def test_without_the_package_one_line_says_so(module: Estimator, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(choose_estimator(module, True, CUDA), TorchEstimator)
    assert [record.getMessage() for record in caplog.records] == [
        "load_trt: the package tensorrt is not installed; using the built-in flow estimator"
    ]


def test_long_builds_say_how_far_they_are(trt, module: Estimator, monkeypatch, caplog):
    monkeypatch.setattr(estimator_plan, "PROGRESS_SECONDS", 0)
    with caplog.at_level(logging.INFO):
        choose_estimator(module, True, CUDA, trt.model_dir)
    assert "load_trt: building: Tactics, step 1 of 1" in caplog.text
    assert "built the engine" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_real_engine_agrees_with_the_module(dtype: torch.dtype, tmp_path: Path):
    pytest.importorskip("tensorrt")
    flow = Flow.from_checkpoint(CHECKPOINT, load_config(CHECKPOINT), CUDA, dtype)
    backend = estimator_trt.load(flow.decoder.estimator, CUDA, tmp_path, 2)  # compares
    assert isinstance(backend, TensorRtEstimator)
