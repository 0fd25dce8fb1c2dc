"""Kernels in CUDA C++: compiled, cached, launched."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from light_tts.kernels.cuda import kernel as kernels  # noqa: E402
from light_tts.kernels.cuda import source as sources  # noqa: E402
from light_tts.kernels.cuda.kernel import Kernel  # noqa: E402

PASS_ON = Path(__file__).parents[1] / "support" / "pass_on.cu"
CLUSTER, CLUSTERS, THREADS, SHARED_BYTES = 4, 6, 128, 200_000
DEFINES = {"THREADS": THREADS, "SHARED_BYTES": SHARED_BYTES}
GPU = torch.device("cuda", 0)


class Parameters(ctypes.Structure):
    _fields_ = (("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("add", ctypes.c_int))


def has_nvrtc() -> bool:
    try:
        return sources.nvrtc is not None and sources.nvrtc_version() >= (12, 0)
    except RuntimeError:
        return False


nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC")


@nvrtc
def test_compiled_without_a_gpu():
    binary = sources.compile_source(PASS_ON, DEFINES)
    assert binary.startswith(b"\x7fELF") and b"pass_on" in binary
    assert binary == sources.compile_source(PASS_ON, DEFINES)
    assert binary != sources.compile_source(PASS_ON, {**DEFINES, "THREADS": 64})


@nvrtc
def test_an_error_names_the_file_and_the_line():
    with pytest.raises(sources.CompilationError) as error:
        sources.compile_source(PASS_ON, {"THREADS": THREADS})
    assert str(error.value).startswith(f"{PASS_ON} cannot be compiled: NVRTC_ERROR_COMPILATION\n")
    assert 'pass_on.cu(13): error: identifier "SHARED_BYTES" is undefined' in str(error.value)


class StandInNVRTC:
    """Compiles everything to b"ELF" with an empty log. Like NVRTC it writes into the bytes that it gets."""

    def nvrtcCreateProgram(self, *_):
        return 0, "program"

    def nvrtcCompileProgram(self, *_):
        return (0,)

    def nvrtcGetProgramLogSize(self, _):
        return 0, 1

    def nvrtcGetProgramLog(self, _, output):
        ctypes.memset(ctypes.c_char_p(output), 0, 1)
        return (0,)

    def nvrtcGetCUBINSize(self, _):
        return 0, 3

    def nvrtcGetCUBIN(self, _, binary):
        ctypes.memmove(ctypes.c_char_p(binary), b"ELF", 3)
        return (0,)

    def nvrtcDestroyProgram(self, _):
        return (0,)


def test_an_empty_log_leaves_the_bytes_of_others_alone(monkeypatch):
    """Python has only one object for each single byte, so NVRTC must not write into one."""
    monkeypatch.setattr(sources, "nvrtc", StandInNVRTC())
    assert sources.compile_source(PASS_ON, DEFINES) == b"ELF"
    assert [bytes([value])[0] for value in range(256)] == list(range(256))


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[tuple]:
    """What is compiled, by a compiler that returns the number of the compilation."""
    done: list[tuple] = []

    def compile_source(source, defines, arch):
        done.append((source.name, dict(defines), arch))
        return str(len(done)).encode()

    monkeypatch.setattr(sources, "compile_source", compile_source)
    monkeypatch.setattr(sources, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    return done


@pytest.fixture
def source(tmp_path) -> Path:
    """A source that includes a file that includes another, and this one the first."""
    folder = tmp_path / "flow"
    (tmp_path / "cuda").mkdir()
    folder.mkdir()
    (folder / "block.cu").write_text('// text\n #include "../cuda/first.cuh"\n#include "missing.cuh"\n')
    (tmp_path / "cuda" / "first.cuh").write_text('# include "second.cuh"\n')
    (tmp_path / "cuda" / "second.cuh").write_text('#include "first.cuh"\n')
    return folder / "block.cu"


def test_the_same_source_is_compiled_once(compiled, source, tmp_path):
    assert sources.cached_binary(source, {"A": 1, "B": 2}, "sm_90a") == b"1"
    assert sources.cached_binary(source, {"B": 2, "A": 1}, "sm_90a") == b"1"
    assert compiled == [("block.cu", {"A": 1, "B": 2}, "sm_90a")]
    [file] = (tmp_path / "cache" / "light_tts").iterdir()
    assert file.name.startswith("block-") and file.read_bytes() == b"1"


def test_what_machine_code_depends_on_is_compiled_again(compiled, source, tmp_path, monkeypatch):
    known = set()

    def binary(defines=(), arch="sm_90a"):
        known.add(sources.cached_binary(source, dict(defines), arch))
        return len(known)

    assert binary() == 1
    assert binary({"A": 1}) == 2
    assert binary({"A": 2}) == 3
    assert binary(arch="sm_100a") == 4
    for number, file in enumerate(
        (source, tmp_path / "cuda" / "first.cuh", tmp_path / "cuda" / "second.cuh")
    ):
        file.write_text(file.read_text() + "int another;\n")
        assert binary() == 5 + number
    (source.parent / "missing.cuh").write_text("")
    assert binary() == 8
    monkeypatch.setattr(sources, "nvrtc_version", lambda: (13, 1))
    assert binary() == 9
    assert binary() == 9 == len(compiled)


def test_a_failed_compilation_leaves_nothing(compiled, source, tmp_path, monkeypatch):
    def fail(*_):
        raise sources.CompilationError("no")

    with monkeypatch.context() as patched, pytest.raises(sources.CompilationError):
        patched.setattr(sources, "compile_source", fail)
        sources.cached_binary(source, {}, "sm_90a")
    assert not (tmp_path / "cache").exists()
    assert sources.cached_binary(source, {}, "sm_90a") == b"1"


def test_a_rehearsed_launch_only_submits_its_kernel(source):
    submitted: list[Kernel] = []
    kernel = Kernel(source, "block", GPU, threads=32)
    with kernels.rehearsing(submitted.append):
        kernel.launch((1, 1, 1), Parameters())
    assert submitted == [kernel]


def test_where_it_is_not_available_the_log_says_why_once(caplog, monkeypatch):
    caplog.set_level("INFO")
    kernels.available.cache_clear()
    assert not kernels.available(torch.device("cpu"))
    assert not kernels.available(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert not kernels.available(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "driver", None)
    kernels.available.cache_clear()
    assert not kernels.available(GPU)
    kernels.available.cache_clear()
    assert caplog.messages == [
        "no kernels in CUDA C++: no GPU",
        "no kernels in CUDA C++: compute capability 8.6 instead of 9.0",
        "no kernels in CUDA C++: the package cuda-bindings is not installed",
    ]


class Chain:
    """Launches of the kernel, each of which reads what the one before has written."""

    def __init__(self) -> None:
        self.kernel = pass_on()
        self.kernel.prepare()
        self.input, self.other = (torch.zeros(CLUSTERS * CLUSTER, THREADS, device=GPU) for _ in range(2))

    def launch(self, times: int, add: int, overlap: bool) -> torch.Tensor:
        """Return the tensor that has the result. The input is overwritten."""
        tensors = self.input, self.other
        for _ in range(times):
            parameters = Parameters(tensors[0].data_ptr(), tensors[1].data_ptr(), add)
            self.kernel.launch((CLUSTERS * CLUSTER, 1, 1), parameters, overlap)
            tensors = tensors[::-1]
        return tensors[0]


def pass_on(threads: int = THREADS, name: str = "pass_on") -> Kernel:
    return Kernel(PASS_ON, name, GPU, threads=threads, shared_bytes=SHARED_BYTES, defines=DEFINES)


@pytest.fixture
def chain(monkeypatch, tmp_path) -> Chain:
    if not kernels.available(GPU):
        pytest.skip("no H100 or H200 with NVRTC")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return Chain()


def numbers(seed: int) -> torch.Tensor:
    shape = CLUSTERS * CLUSTER, THREADS
    return torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(seed)).float()


def passed_on(x: torch.Tensor, times: int, add: int) -> torch.Tensor:
    return x.view(CLUSTERS, CLUSTER, THREADS).roll(times, 1).view_as(x) + times * add


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_launches(chain, overlap):
    for times, add in ((1, 5), (201, 3)):
        chain.input.copy_(numbers(times))
        assert torch.equal(chain.launch(times, add, overlap).cpu(), passed_on(numbers(times), times, add))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_launches_on_another_stream_and_in_a_graph(chain, overlap):
    with torch.cuda.stream(torch.cuda.Stream()):
        chain.input.copy_(numbers(0))
        assert torch.equal(chain.launch(6, 2, overlap).cpu(), passed_on(numbers(0), 6, 2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain.launch(50, 1, overlap)
    for seed in (1, 2):
        chain.input.copy_(numbers(seed))
        graph.replay()
        assert torch.equal(result.cpu(), passed_on(numbers(seed), 50, 1))


@pytest.mark.gpu
def test_a_graph_may_be_the_first_that_launches_a_prepared_kernel(chain):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain.launch(3, 1, True)
    chain.input.copy_(numbers(0))
    graph.replay()
    assert torch.equal(result.cpu(), passed_on(numbers(0), 3, 1))


@pytest.mark.gpu
def test_a_kernel_is_not_loaded_while_a_graph_is_recorded(chain):
    chain.kernel = pass_on()
    with (
        pytest.raises(RuntimeError, match="pass_on was not prepared"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        chain.launch(1, 1, False)


@pytest.mark.gpu
def test_errors_of_the_driver_name_the_kernel(chain):
    with pytest.raises(RuntimeError, match=r"another of .* cannot be loaded: CUDA_ERROR_NOT_FOUND"):
        pass_on(name="another").prepare()
    chain.kernel = pass_on(threads=2048)  # more than a block can have
    with pytest.raises(RuntimeError, match="pass_on was not launched: CUDA_ERROR_INVALID_VALUE"):
        chain.launch(1, 1, False)
