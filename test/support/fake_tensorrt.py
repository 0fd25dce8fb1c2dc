"""A fake of the tensorrt package: the part of its API that is used here.

An engine is its ONNX graph, run by ONNX Runtime on the CPU. Inputs and outputs are read and written at the
given addresses, as in TensorRT. Activations really overwrite the memory provided for them.
"""

from __future__ import annotations

import ctypes
import sys
import types
from enum import Enum, IntEnum
from typing import ClassVar

import numpy as np
import onnxruntime

PLAN = b"plan of the fake: "
ACTIVATIONS = 1 << 16  # bytes


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(Enum):
    WORKSPACE = 0


class BuilderFlag(Enum):
    TF32 = 0


class PreviewFeature(Enum):
    RUNTIME_ACTIVATION_RESIZE_10_10 = 2


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.onnx = b""


class OnnxParser:
    refuses = False

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network
        self.num_errors = 1

    def parse(self, data: bytes) -> bool:
        self._network.onnx = data
        return not self.refuses

    def get_error(self, index: int) -> str:
        return "In node 7: no importer"


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, name: str, least, usual, most) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        self.shapes[name] = [least, usual, most]


class BuilderConfig:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.progress_monitor: IProgressMonitor | None = None
        self.max_aux_streams = -1

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None: ...
    def set_preview_feature(self, feature: PreviewFeature, on: bool) -> None: ...
    def clear_flag(self, flag: BuilderFlag) -> None: ...

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Builder:
    fails = False
    builds: ClassVar[list[tuple[Network, BuilderConfig]]] = []

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        Builder.builds.append((network, config))
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Tactics", "Building", 1)
        assert monitor.step_complete("Tactics", 0)
        monitor.phase_finish("Tactics")
        assert monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        if Builder.fails:
            self._logger.log(Severity.ERROR, "no tactic fits")
            return None
        most = config.profiles[0].shapes["x"][2]
        return PLAN + f"{most[0]},{most[2]};".encode() + network.onnx


class Runtime:
    def __init__(self, logger: ILogger) -> None: ...

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        return Engine(data[len(PLAN) :]) if data.startswith(PLAN) else None


class Engine:
    def __init__(self, data: bytes) -> None:
        limits, _, onnx = data.partition(b";")
        self.most = tuple(map(int, limits.split(b",")))
        self.session = onnxruntime.InferenceSession(onnx)
        self.contexts: list[Context] = []

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    wrong_by = 0.0  # added to the output

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = -1
        self._memory = 0
        self.streams: list[int] = []

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile == 0
        batch, frames = self._engine.most
        self._shapes[name] = shape
        return shape[0] <= batch and (name in ("t", "spks") or shape[-1] <= frames)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes["x"]

    def update_device_memory_size_for_shapes(self) -> int:
        return ACTIVATIONS

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= ACTIVATIONS
        self._memory = address

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        if not self._memory:
            return False
        ctypes.memset(self._memory, 0x5A, ACTIVATIONS)
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}
        inputs = {
            value.name: _array(self._addresses[value.name], self._shapes[value.name], kinds[value.type])
            for value in self._engine.session.get_inputs()
        }
        [result] = self._engine.session.run(None, inputs)
        _array(self._addresses["velocity"], result.shape, result.dtype.type)[...] = result + self.wrong_by
        return True


def _array(address: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)


def module() -> types.ModuleType:
    """To be put into sys.modules as tensorrt."""
    fake = types.ModuleType("tensorrt")
    fake.__dict__.update({name: value for name, value in globals().items() if not name.startswith("_")})
    fake.__version__ = "10.9.0.34"
    fake.__spec__ = sys.modules[__name__].__spec__
    return fake
