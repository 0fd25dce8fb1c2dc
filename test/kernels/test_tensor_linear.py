"""The linear layers in CUDA C++ against their PyTorch references: on a GPU that can run them in the sizes of
the language model, else on the emulator in small ones."""

# ruff: noqa: E402

from __future__ import annotations

import ctypes
import mmap
import subprocess
from pathlib import Path

import pytest
import torch
from support import cuda_on_cpu
from support.tensor_linear_on_cpu import Emulator
from torch import Tensor

triton = pytest.importorskip("triton")
from light_tts.kernels import configs
from light_tts.kernels.cuda import source as sources
from light_tts.kernels.cuda.kernel import available
from light_tts.kernels.launch import Config
from light_tts.kernels.llm import tensor_linear
from light_tts.kernels.llm.small_linear import (
    linear_add_reference_,
    norm_gate_up_silu_reference,
    rms_norm_linear_reference,
)
from light_tts.kernels.llm.tensor_linear import TensorLinear, Variant, linear_config, pack, supported

GPU = torch.cuda.is_available() and available(torch.device("cuda", torch.cuda.current_device()))
DEVICE = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
EPS = 1e-6
DTYPES = [torch.float16, torch.bfloat16]
KINDS = ["norm_bias", "norm", "gated", "add"]
SMALL = {"norm_bias": (42, 128), "norm": (16, 64), "gated": (24, 128), "add": (36, 256)}  # outputs, inputs
FULL = {"norm_bias": (6564, 896), "norm": (1152, 896), "gated": (4864, 896), "add": (896, 4864)}
ONE_BLOCK: Config = {"OUTPUT_TILES": 1, "SPLITS": 1, "PAIRS": 2, "STAGED": 0}
TWO_TILES: Config = {"OUTPUT_TILES": 2, "SPLITS": 1, "PAIRS": 1, "STAGED": 0}
CLUSTER: Config = {"OUTPUT_TILES": 1, "SPLITS": 2, "PAIRS": 1, "STAGED": 0}
WIDE_CLUSTER: Config = {"OUTPUT_TILES": 2, "SPLITS": 4, "PAIRS": 1, "STAGED": 0}
UNEVEN: Config = {"OUTPUT_TILES": 1, "SPLITS": 1, "PAIRS": 3, "STAGED": 0}
STAGED: Config = {"OUTPUT_TILES": 3, "SPLITS": 1, "PAIRS": 2, "STAGED": 1}
STAGED_MANY_TILES: Config = {"OUTPUT_TILES": 5, "SPLITS": 1, "PAIRS": 4, "STAGED": 1}
STAGED_UNEVEN: Config = {"OUTPUT_TILES": 1, "SPLITS": 2, "PAIRS": 3, "STAGED": 1}
STAGED_CLUSTER: Config = {"OUTPUT_TILES": 2, "SPLITS": 4, "PAIRS": 1, "STAGED": 1}
STAGED_WIDE_CLUSTER: Config = {"OUTPUT_TILES": 4, "SPLITS": 8, "PAIRS": 1, "STAGED": 1}

pytestmark = pytest.mark.skipif(
    not GPU and not cuda_on_cpu.AVAILABLE, reason="needs a GPU, or g++ on Linux, x86-64"
)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory)


@pytest.fixture(autouse=True)
def kernels(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(tensor_linear, "_kernel", emulator.kernel)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal within two units in the last place, relative to the largest value of a row."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().amax(-1)
    bound = 2 * torch.finfo(actual.dtype).eps * expected.double().abs().amax(-1)
    assert (error <= bound).all(), f"error {error}, allowed {bound}"


class Layer:
    """A layer of one of KINDS with random weights."""

    def __init__(self, kind: str, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        gated, norm = kind == "gated", kind != "add"
        self._kind = kind
        self._weight = randn(outputs * (1 + gated), inputs, dtype=dtype, seed=1) * inputs**-0.5
        self._bias = randn(outputs, dtype=dtype, seed=2) if kind == "norm_bias" else None
        self.linear = TensorLinear(self._weight, self._bias, EPS if norm else None, gated)

    def __call__(self, x: Tensor, residual: Tensor, config: Config | None = None) -> Tensor:
        if self._kind != "add":
            return self.linear(x, None, config)
        out = torch.cat([residual, torch.ones_like(residual)])
        self.linear(x, out[: len(x)], config)
        assert (out[len(x) :] == 1).all()  # is not written
        return out[: len(x)]

    def expected(self, x: Tensor, residual: Tensor) -> Tensor:
        x, residual, weight = x.double(), residual.double(), self._weight.double()
        if self._kind == "add":
            linear_add_reference_(residual, x, weight)
            return residual
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        products = scaled @ weight.T
        if self._kind == "gated":
            gate, up = products.chunk(2, -1)
            return torch.nn.functional.silu(gate) * up
        return products if self._bias is None else products + self._bias.double()


def check(layer: Layer, rows: int, dtype: torch.dtype, config: Config | None = None) -> None:
    linear = layer.linear
    # the rows after the last one must not be read or written
    all_x = randn(rows + 1, linear.inputs, dtype=dtype, seed=3)
    all_x[-1] = torch.nan
    x, residual = all_x[:rows], randn(rows, linear.outputs, dtype=dtype, seed=4)
    close(layer(x, residual, config), layer.expected(x, residual))


@pytest.mark.parametrize(
    "kind,rows,dtype,config",
    [
        ("norm_bias", 8, torch.bfloat16, TWO_TILES),
        ("norm_bias", 9, torch.float16, WIDE_CLUSTER),
        ("norm", 3, torch.bfloat16, CLUSTER),
        ("norm", 9, torch.float16, None),
        ("norm_bias", 1, torch.float16, UNEVEN),
        ("norm_bias", 17, torch.float16, STAGED_CLUSTER),
        ("gated", 3, torch.float16, None),
        ("gated", 33, torch.bfloat16, ONE_BLOCK),
        ("gated", 8, torch.float16, CLUSTER),
        ("gated", 21, torch.float16, UNEVEN),
        ("gated", 64, torch.bfloat16, STAGED),
        ("gated", 16, torch.float16, STAGED_MANY_TILES),
        ("add", 1, torch.bfloat16, CLUSTER),
        ("add", 9, torch.float16, ONE_BLOCK),
        ("add", 33, torch.float16, WIDE_CLUSTER),
        ("add", 64, torch.bfloat16, None),
        ("add", 10, torch.float16, STAGED),
        ("add", 33, torch.float16, STAGED_UNEVEN),
        ("add", 30, torch.bfloat16, STAGED_WIDE_CLUSTER),
    ],
)
def test_small_layers(kind: str, rows: int, dtype: torch.dtype, config: Config | None) -> None:
    check(Layer(kind, *SMALL[kind], dtype), rows, dtype, config)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_language_model(kind: str, dtype: torch.dtype, rows: int) -> None:
    check(Layer(kind, *FULL[kind], dtype), rows, dtype)


def test_a_row_does_not_depend_on_the_others() -> None:
    dtype = torch.float16
    layer = Layer("gated", *SMALL["gated"], dtype)
    x = randn(8, layer.linear.inputs, dtype=dtype)
    residual = x.new_empty(8, layer.linear.outputs)
    together = layer(x, residual)
    strange = x.clone()
    strange[::2] = torch.tensor([torch.nan, torch.inf, 1.0, 0.0], device=DEVICE)[:, None]
    assert torch.equal(layer(strange, residual)[1::2], together[1::2])
    assert torch.equal(layer(x[:3], residual[:3]), together[:3])


@pytest.mark.skipif(GPU, reason="needs the emulator")
@pytest.mark.parametrize("kind,rows", [("gated", 3), ("norm", 9)])  # which are compiled anyway
def test_no_rows_are_read_that_do_not_exist(kind: str, rows: int) -> None:
    dtype = torch.float16
    layer = Layer(kind, *SMALL[kind], dtype)
    x = randn(rows, layer.linear.inputs, dtype=dtype)
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    at_the_end = torch.frombuffer(memory, dtype=dtype, count=mmap.PAGESIZE // 2)[-x.numel() :].view(x.shape)
    at_the_end.copy_(x)
    residual = x.new_empty(rows, layer.linear.outputs)
    assert torch.equal(layer(at_the_end, residual), layer(x, residual))
    with pytest.raises(cuda_on_cpu.KernelError):
        layer.linear(torch.frombuffer(memory, dtype=dtype).view(-1, x.shape[1])[-rows:])


def test_references_are_those_of_the_triton_kernels() -> None:
    x = randn(3, 64, dtype=torch.float16)
    for kind, reference in (("norm", rms_norm_linear_reference), ("gated", norm_gate_up_silu_reference)):
        layer = Layer(kind, 16, 64, torch.float16)
        bias = (None,) if kind == "norm" else ()
        close(reference(x, EPS, layer._weight, *bias), layer.expected(x, x))


def test_a_packed_weight_has_the_elements_of_each_lane_together() -> None:
    outputs, inputs = 24, 64
    weight = torch.arange(outputs * inputs).view(outputs, inputs).to(torch.float32)
    packed = pack(weight, gated=False)
    assert packed.shape == (2, 4, 32, 8)
    # tile 0, second product of inputs 32 to 63, g = 5, t = 2
    own = [(5, 52), (5, 53), (13, 52), (13, 53), (5, 54), (5, 55), (13, 54), (13, 55)]
    assert packed[0, 3, 4 * 5 + 2].tolist() == [output * inputs + input for output, input in own]
    assert (packed[1, :, :, 2:4] == 0).all()  # outputs 24 to 31


def test_a_packed_gated_weight_has_gates_and_their_values_together() -> None:
    outputs, inputs = 10, 32
    weight = torch.arange(2 * outputs * inputs).view(2 * outputs, inputs).to(torch.float32)
    packed = pack(weight, gated=True)
    assert packed.shape == (2, 2, 32, 8)
    # tile 1, first product, g = 1, t = 0: output 9
    own = [(9, 0), (9, 1), (19, 0), (19, 1), (9, 2), (9, 3), (19, 2), (19, 3)]
    assert packed[1, 0, 4].tolist() == [row * inputs + input for row, input in own]
    assert (packed[1, :, 8:] == 0).all()  # outputs 10 to 15


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_loaded_before_the_previous_kernel_ends(kind: str, rows: int, tmp_path: Path) -> None:
    """The compiler must not move the loads behind the wait (ACQBULK), nor move registers to memory."""
    variant = full_variant(kind, rows)
    tool = triton.knobs.nvidia.cuobjdump.path
    try:
        binary = sources.compile_source(tensor_linear.SOURCE, variant.macros)
    except (AttributeError, RuntimeError):
        pytest.skip("no NVRTC")
    (tmp_path / "kernel.cubin").write_bytes(binary)
    code = subprocess.check_output([tool, "--dump-sass", tmp_path / "kernel.cubin"], text=True)
    before, after = code.split("ACQBULK")
    assert before.count("LDG.E.NA.128") == 2 * variant.pairs * variant.output_tiles
    assert "LDG.E.NA.128" not in after
    assert "LDL" not in code and "STL" not in code


def full_variant(kind: str, rows: int) -> Variant:
    outputs, inputs = FULL[kind]
    weight = torch.empty(outputs * (1 + (kind == "gated")), inputs, dtype=torch.float16)
    bias = weight[:, 0] if kind == "norm_bias" else None
    linear = TensorLinear(weight, bias, EPS if kind != "add" else None, kind == "gated")
    return linear.variant(torch.empty(rows, inputs, dtype=torch.float16), kind == "add")


def test_more_rows_are_refused() -> None:
    layer = TensorLinear(randn(16, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match="65 rows"):
        layer(randn(65, 64, dtype=torch.float16))


def test_configurations_of_the_language_model() -> None:
    for outputs, inputs in (*FULL.values(), (896, 896)):
        assert supported(outputs, inputs, gated=(outputs, inputs) == FULL["gated"])
        for rows in (8, 16, 32, 64):
            config = linear_config(
                DEVICE, torch.float16, outputs, inputs, (outputs, inputs) == (4864, 896), rows
            )
            steps = config["SPLITS"] * config["PAIRS"] * tensor_linear.STEP
            assert inputs % (config["SPLITS"] * tensor_linear.STEP) == 0 and inputs <= 32 * steps
    assert not supported(15, 64) and not supported(16, 48) and not supported(16, 32 * 300)


def test_measured_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"rows": 16, "outputs": 32, "inputs": 64, "OUTPUT_TILES": 3, "SPLITS": 1, "PAIRS": 1}
    entries = [{"first": 2, "rows": 32}, measured]
    monkeypatch.setattr(configs, "load", lambda device: {"tensor_linear": entries})
    monkeypatch.setattr(tensor_linear, "available", lambda device: True)
    linear_config.cache_clear()
    assert tensor_linear.measured_rows(DEVICE, torch.float16) == range(2, 33)
    assert not tensor_linear.measured_rows(DEVICE, torch.float32)
    found = [
        linear_config(DEVICE, torch.float16, 32, 64, False, rows)["OUTPUT_TILES"] for rows in (8, 16, 32)
    ]
    assert found == [3, 3, 1]
    linear_config.cache_clear()
    monkeypatch.setattr(tensor_linear, "available", lambda device: False)
    assert not tensor_linear.measured_rows(DEVICE, torch.float16)
    entries[:] = [{"rows": 100}]
    monkeypatch.setattr(tensor_linear, "available", lambda device: True)
    assert tensor_linear.measured_rows(DEVICE, torch.float16) == range(1, 65)
