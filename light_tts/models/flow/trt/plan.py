"""Plans: TensorRT engines of the flow estimator as files. Built once per GPU, then only read.

Uses the documented Python API of TensorRT 10 (and 11, whose networks are always strongly typed).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from light_tts.models.flow.trt import onnx_graph as estimator_onnx
from light_tts.models.flow.unet.estimator import Estimator

WORKSPACE = 4 << 30  # workspace of a layer in bytes, beyond its inputs and outputs
FORMAT = 1  # increase with every change of the graph or the build
PROGRESS_SECONDS = 10.0

log = logging.getLogger(__name__)


class TensorRtError(Exception):
    """TensorRT failed; the message says why."""


@dataclass(frozen=True)
class EngineSizes:
    """Supported sizes of an engine: batches of 2 (guided and unguided) to `max_batch` rows of 2 to
    `max_frames`."""

    max_batch: int
    max_frames: int = 3000  # 60 s of prompt and speech
    usual_frames: int = 600  # the size the engine is tuned for, with the full batch
    min_batch: int = 2
    min_frames: int = 2

    def take(self, batch: int, frames: int) -> bool:
        return self.min_batch <= batch <= self.max_batch and self.min_frames <= frames <= self.max_frames


def open_engine(
    trt: Any, logger: Any, module: Estimator, device: torch.device, model_dir: Path | None, sizes: EngineSizes
) -> Any:
    """Return the engine of these weights for this GPU: read from the checkpoint's directory or the user's
    cache, or built and stored there. If several processes need it, one builds it and the others wait. Raises
    TensorRtError, OSError."""
    name = plan_name(trt.__version__, module, device, sizes)
    runtime = trt.Runtime(logger)
    directories = [directory for directory in (model_dir, _cache_dir()) if directory is not None]
    for directory in directories:
        engine = _read(runtime, directory / name)
        if engine is not None:
            return engine
    plan = _writable(directories) / name
    with _one_builder(plan):
        engine = _read(runtime, plan)  # another process may have built it in the meantime
        if engine is None:
            _write(plan, _build(trt, logger, module, sizes))
            engine = _read(runtime, plan)
    if engine is None:
        raise TensorRtError(f"the engine that was built, {plan}, cannot be read")
    return engine


def plan_name(version: str, module: Estimator, device: torch.device, sizes: EngineSizes) -> str:
    """Return a file name that identifies everything an engine depends on."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-")
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    precision = str(module.final_proj.weight.dtype).removeprefix("torch.")
    size = f"b{sizes.max_batch}.f{sizes.max_frames}"
    return f"flow.estimator.{gpu}.sm{capability}.trt{version}.{precision}.{size}.{_digest(module)}.plan"


def _digest(module: Estimator) -> str:
    """Return a digest of the weights and the build settings."""
    digest = hashlib.sha256(f"{FORMAT} {estimator_onnx.OPSET} {WORKSPACE}".encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


# -- files


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "light_tts"


def _writable(directories: Sequence[Path]) -> Path:
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                return directory
    raise TensorRtError(f"cannot store an engine in {' or '.join(map(str, directories))}: not writable")


def _read(runtime: Any, plan: Path) -> Any:
    """Return the engine in a file, or None if there is none that this TensorRT version can read."""
    try:
        data = plan.read_bytes()
    except OSError:
        return None
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        log.warning("load_trt: %s cannot be read", plan)
    return engine


def _write(plan: Path, data: bytes) -> None:
    """Write the file atomically."""
    descriptor, name = tempfile.mkstemp(dir=plan.parent, prefix=f"{plan.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, plan)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _one_builder(plan: Path) -> Iterator[None]:
    with open(f"{plan}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("load_trt: another process is building the engine; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- building


def _build(trt: Any, logger: Any, module: Estimator, sizes: EngineSizes) -> bytes:
    log.info("load_trt: building an engine for this GPU; this takes minutes and happens only once")
    started = time.monotonic()
    builder = trt.Builder(logger)
    # Strongly typed: TensorRT keeps the types of the graph, including float32.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(estimator_onnx.export(module)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise TensorRtError(f"TensorRT cannot parse the ONNX graph: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # use full float32
    config.max_aux_streams = 0  # use only the caller's stream, which orders the reuse of memory
    if hasattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10"):
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    config.progress_monitor = progress = _progress_monitor(trt)  # must outlive the build
    config.add_optimization_profile(_profile(builder, module.final_proj.out_channels, sizes))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise TensorRtError(f"the engine cannot be built: {logger.last_error or 'no reason given'}")
    log.info("load_trt: built the engine (%.0f s, %d steps)", time.monotonic() - started, progress.steps)
    return bytes(plan)


def _profile(builder: Any, channels: int, sizes: EngineSizes) -> Any:
    profile = builder.create_optimization_profile()
    least, usual, most = (
        estimator_onnx.input_shapes(channels, batch, frames)
        for batch, frames in (
            (sizes.min_batch, sizes.min_frames),
            (sizes.max_batch, sizes.usual_frames),
            (sizes.max_batch, sizes.max_frames),
        )
    )
    for name in estimator_onnx.INPUTS:
        profile.set_shape(name, least[name], usual[name], most[name])
    return profile


def make_logger(trt: Any) -> Any:
    """Return a TensorRT logger that writes to the log; `last_error` is used in our own messages."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.last_error = message
                log.error("TensorRT: %s", message)
            elif severity == trt.ILogger.Severity.WARNING:
                log.debug("TensorRT: %s", message)

    return Logger()


def _progress_monitor(trt: Any) -> Any:
    """Return a monitor that logs the build's progress occasionally. TensorRT calls it from several
    threads.
    """

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps = 0
            self._lock = threading.Lock()
            self._sizes: dict[str, int] = {}
            self._said = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._sizes[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self.steps += 1
                if time.monotonic() - self._said >= PROGRESS_SECONDS:
                    self._said = time.monotonic()
                    log.info(
                        "load_trt: building: %s, step %d of %d", phase_name, step + 1, self._sizes[phase_name]
                    )
            return True  # continue

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._sizes.pop(phase_name, None)

    return Progress()
