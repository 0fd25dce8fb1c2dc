"""The flow estimator as a TensorRT engine (--load_trt True)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from light_tts.models.flow.masks import EstimatorMasks
from light_tts.models.flow.trt.onnx_graph import OUTPUT, graph_inputs
from light_tts.models.flow.trt.plan import EngineSizes, TensorRtError, make_logger, open_engine
from light_tts.models.flow.unet.estimator import Estimator

TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class TensorRtEstimator:
    """Runs the engine on the caller's current stream without waiting for it. Sizes that the engine does not
    support are computed by the module.

    A context may be used by one stream at a time, so each thread has one per stream. Their activations use
    PyTorch's allocator, sized by each call's shapes.
    """

    def __init__(self, trt: Any, engine: Any, module: Estimator, sizes: EngineSizes) -> None:
        self._trt = trt
        self._engine = engine
        self._module = module
        self._sizes = sizes
        self._contexts: dict[tuple[int, int], Any] = {}

    def __call__(
        self, x: Tensor, masks: EstimatorMasks, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        """Shapes as in `Estimator.forward`. Raises TensorRtError."""
        if not self._sizes.take(x.shape[0], x.shape[2]):
            return self._module(x, masks, mu, t, spks, cond)
        stream = torch.cuda.current_stream(x.device)
        context = self._context(stream.cuda_stream)
        inputs = graph_inputs(x, masks, mu, t, spks, cond)
        for name, value in inputs.items():
            value.record_stream(stream)  # it may have been created on another stream
            if not context.set_input_shape(name, tuple(value.shape)):
                raise TensorRtError(f"{name} of shape {tuple(value.shape)} is refused")
            _set_address(context, name, value)
        if tuple(context.get_tensor_shape(OUTPUT)) != tuple(x.shape):
            raise TensorRtError(f"the output has shape {tuple(context.get_tensor_shape(OUTPUT))}")
        velocity = torch.empty_like(x, memory_format=torch.contiguous_format)
        _set_address(context, OUTPUT, velocity)
        size = max(1, context.update_device_memory_size_for_shapes())
        activations = torch.empty(size, dtype=torch.uint8, device=x.device)
        context.set_device_memory(activations.data_ptr(), size)
        if not context.execute_async_v3(stream.cuda_stream):
            raise TensorRtError("execution failed")
        # Free inputs and activations here, not earlier: memory reused by others is then written later in the
        # stream.
        del inputs, activations
        return velocity

    def _context(self, stream: int) -> Any:
        key = (threading.get_ident(), stream)
        if key not in self._contexts:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
            if context is None or not context.set_optimization_profile_async(0, stream):
                raise TensorRtError("cannot create an execution context")
            self._contexts[key] = context
        return self._contexts[key]


def _set_address(context: Any, name: str, value: Tensor) -> None:
    if not context.set_tensor_address(name, value.data_ptr()):
        raise TensorRtError(f"the address of {name} is refused")


def load(
    module: Estimator, device: torch.device, model_dir: Path | None, max_batch_size: int
) -> TensorRtEstimator:
    """Return the engine for `max_batch_size` concurrent requests (two rows each), checked against the module.

    Takes minutes if it must be built. Raises TensorRtError, or any exception of the export.
    """
    import tensorrt as trt

    sizes = EngineSizes(2 * max_batch_size)
    engine = open_engine(trt, make_logger(trt), module, device, model_dir, sizes)
    estimator = TensorRtEstimator(trt, engine, module, sizes)
    check(estimator, module)
    return estimator


@torch.inference_mode()
def check(estimator: TensorRtEstimator, module: Estimator) -> None:
    """Compare with the module on random inputs. Raises TensorRtError if the results differ."""
    weight = module.final_proj.weight
    lengths = torch.tensor([64, 41], device=weight.device)
    generator = torch.Generator().manual_seed(0)
    channels = module.final_proj.out_channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    x, mu, cond = (normal(2, channels, 64) for _ in range(3))
    t = torch.full((2,), 0.5, dtype=weight.dtype, device=weight.device)
    spks = normal(2, channels)
    for chunk in (None, 24):
        masks = EstimatorMasks.build(lengths, 64, chunk, weight.dtype)
        expected = module(x, masks, mu, t, spks, cond).float()
        error = (estimator(x, masks, mu, t, spks, cond).float() - expected).norm() / expected.norm()
        if not error <= TRIAL_TOLERANCE[weight.dtype]:
            raise TensorRtError(f"the engine's results differ from the module's by {float(error):.2g}")
