"""Runs the checkpoint's ONNX models on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from light_tts.models.checkpoint.weights import CheckpointError


class OnnxModel:
    """One ONNX model. `run` may be called from several threads concurrently; each call uses one core."""

    def __init__(self, path: Path, inputs: int) -> None:
        """Raises CheckpointError if the file is missing, damaged, or does not take `inputs` inputs."""
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has an exception type for each kind of damage
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path}: expected an ONNX model: {reason}") from None
        self._names = [node.name for node in self._session.get_inputs()]
        if len(self._names) != inputs:
            raise CheckpointError(f"{path}: expected a model with {inputs} inputs, found {self._names}")

    def run(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return the model's first output. `values`: inputs in the model's order."""
        return self._session.run(None, dict(zip(self._names, values, strict=True)))[0]
