#!/usr/bin/env python3
"""Measures launch configurations of the language model's decode kernels on this machine's GPU and writes the
fastest to light_tts/kernels/configs/, where the kernels find them. Takes about two minutes:

    python scripts/tune_kernels.py

Each candidate is measured in whole decode steps of the real engine, one kernel at a time, with the best so
far for all others: kernels overlap, so what is fastest alone is often not fastest in a step. It starts with
the current configurations, so running it again continues from there.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_llm
import torch
import triton

from light_tts.engine.llm.engine import LLMEngine
from light_tts.engine.llm.triton_runner import TritonRunner
from light_tts.kernels import configs
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.launch import SIZES, Config
from light_tts.kernels.llm.decode_attention import decode_config
from light_tts.kernels.llm.row_linear import MAX_FEW, row_config
from light_tts.kernels.llm.small_linear import MAX_ROWS, linear_config

OUTPUT = 128  # tokens
PROMPTS = {512: 125, 1024: 700}  # tokens, by the max_length of the attention that prompt and output need
KV_HEADS = 2
# kernel, outputs, inputs (CosyVoice2-0.5B): values of LINEAR
LINEAR = ("BLOCK_OUT", "BLOCK_K", "num_warps", "num_stages", "SPLITS")  # SPLITS: of linear_add_ alone
LINEARS: dict[tuple[str, int, int], list[tuple[int, ...]]] = {
    ("norm_gate_up_silu", 9728, 896): [
        (64, 64, 4, 6),
        (64, 64, 4, 7),
        (64, 64, 4, 8),
        (64, 64, 4, 9),
        (32, 64, 4, 7),
        (32, 128, 4, 3),
        (32, 128, 4, 5),
        (64, 128, 4, 3),
        (64, 128, 4, 4),
        (64, 32, 4, 12),
    ],
    ("linear_add_", 896, 4864): [
        (16, 128, 4, 4, 4),
        (16, 128, 4, 6, 4),
        (16, 128, 4, 8, 4),
        (16, 64, 4, 8, 4),
        (16, 128, 4, 6, 3),
        (32, 128, 4, 4, 4),
        (32, 64, 4, 7, 4),
    ],
    ("rms_norm_linear", 1152, 896): [
        (32, 64, 4, 7),
        (32, 64, 4, 10),
        (32, 128, 4, 4),
        (32, 128, 4, 7),
        (16, 128, 4, 7),
    ],
    ("linear_add_", 896, 896): [
        (16, 128, 4, 4, 2),
        (16, 64, 4, 7, 2),
        (16, 128, 4, 3, 3),
        (16, 128, 4, 7, 1),
        (32, 128, 4, 4, 2),
    ],
    ("rms_norm_linear", 6564, 896): [(32, 64, 4, 4), (32, 64, 4, 7), (64, 64, 4, 6)],
}
ROW = ("BLOCK_OUT", "num_warps")
ROWS = {  # by the inputs rounded up: values of ROW
    1024: [(4, 4), (8, 4), (2, 4), (4, 2), (2, 2), (8, 8)],
    8192: [(2, 8), (2, 16), (4, 16), (1, 8), (1, 4), (4, 8)],
}
DECODE = ("BLOCK", "SPLIT", "num_warps")
DECODES = [  # values of DECODE
    (512, 512, 8),
    (128, 512, 8),
    (256, 512, 8),
    (256, 256, 8),
    (128, 128, 4),
    (64, 64, 4),
]
BATCHES = (1, 2, 64, 8, 32)  # 64 rows before the others, which share its linears

Entry = dict[str, int]  # sizes and configuration


@dataclass(frozen=True)
class Trial:
    """A tuning of `kernel` in decode steps of `batch` requests with a prompt of this many tokens: candidates
    for the entry with these `keys`."""

    kernel: str
    batch: int
    keys: Entry
    candidates: list[Config]
    prompt: int = PROMPTS[512]

    def entries(self) -> Iterator[Entry]:
        for candidate in self.candidates:
            yield {**self.keys, **candidate}


def _named(names: Sequence[str], values: Sequence[int]) -> Config:
    return dict(zip(names, values, strict=False))


def all_trials(batches: list[int]) -> list[Trial]:
    trials: list[Trial] = []
    for batch in batches:
        if batch <= MAX_FEW or batch == MAX_ROWS:
            for (kernel, outputs, inputs), candidates in LINEARS.items():
                keys = {"outputs": outputs, "inputs": inputs}
                if batch <= MAX_FEW:
                    rows = [_named(ROW, values) for values in ROWS[triton.next_power_of_2(inputs)]]
                    trials.append(Trial("row_linear", batch, {**keys, "rows": batch}, rows))
                else:
                    linears = [_named(LINEAR, values) for values in candidates]
                    trials.append(Trial(kernel, batch, keys, linears))
        for max_length, prompt in PROMPTS.items():
            keys = {"groups": batch * KV_HEADS, "max_length": max_length}
            decode = [_named(DECODE, values) for values in DECODES]
            trials.append(Trial("decode_attention", batch, keys, decode, prompt))
    return trials


class Tuner:
    """`found`: the current entries by kernel, which the kernels use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.found: dict[str, Any] = {**configs.load(device), "fused_rows": MAX_ROWS}
        self.found["overlap"] = {**self.found.get("overlap", {}), "llm": [[1, MAX_ROWS]]}
        configs.load = lambda device: self.found
        self._batches = ["--output", str(OUTPUT), "--batches", *map(str, BATCHES)]
        self._model = bench_llm.random_model("full", device)
        self._engine = self._new_engine()

    def compile(self, trials: list[Trial]) -> None:
        """Compile the kernels of all candidates in parallel."""
        runner = self._engine._runner
        assert isinstance(runner, TritonRunner)

        def rehearse() -> None:
            for trial in trials:
                for entry in trial.entries():
                    with self._using(trial.kernel, entry):
                        runner._decode_step(trial.batch, trial.prompt + OUTPUT)

        with contextlib.suppress(triton.runtime.errors.OutOfResources):  # raised again when it is measured
            compile_ahead(self._device, rehearse)

    def tune(self, trial: Trial) -> None:
        """Keep the fastest of the candidates and the current entry, and print all."""
        times = {}
        in_use = [entry for entry in self.found.get(trial.kernel, []) if _keys(entry) == trial.keys]
        for entry in [*in_use, *(entry for entry in trial.entries() if entry not in in_use)]:
            with self._using(trial.kernel, entry):
                times[tuple(entry.items())] = self.milliseconds(trial.batch, trial.prompt)
        best = min(times, key=times.__getitem__)
        self._put(trial.kernel, dict(best))
        keys = " ".join(f"{name}={value}" for name, value in trial.keys.items())
        print(f"batch {trial.batch}: {trial.kernel} {keys}")
        for entry, time_ in sorted(times.items(), key=lambda pair: pair[1]):
            print(
                "  ", " ".join(str(value) for _, value in entry[len(trial.keys) :]), f"{time_:.4f} ms a step"
            )

    def milliseconds(self, batch: int, prompt: int = PROMPTS[512]) -> float:
        """Return the duration of a decode step with the current entries."""
        self._engine._runner.graphs.clear()
        self._engine._runner.graphs.at_first_use = True
        try:
            measured = [
                bench_llm.measure(self._engine, self._model, batch, self._arguments(prompt), output).ms_a_step
                for output in (24, OUTPUT, OUTPUT)  # the first run records the graphs
            ]
        except triton.runtime.errors.OutOfResources:
            return math.inf
        return min(measured[1:])

    def _arguments(self, prompt: int) -> argparse.Namespace:
        return bench_llm.parser().parse_args(["--prompt", str(prompt), *self._batches])

    def _new_engine(self) -> LLMEngine:
        with contextlib.redirect_stdout(None):
            return bench_llm.make_engine(self._model, self._arguments(max(PROMPTS.values())))

    @contextlib.contextmanager
    def _using(self, kernel: str, entry: Entry) -> Iterator[None]:
        before = self.found.get(kernel, [])
        self._put(kernel, entry)
        yield
        self.found[kernel] = before
        _forget_chosen()

    def _put(self, kernel: str, entry: Entry) -> None:
        """Replace the entry for the same sizes."""
        others = [other for other in self.found.get(kernel, []) if _keys(other) != _keys(entry)]
        self.found[kernel] = [*others, entry]
        _forget_chosen()


def _keys(entry: Entry) -> Entry:
    """Return the sizes that an entry applies to."""
    return {name: value for name, value in entry.items() if name in SIZES}


def _forget_chosen() -> None:
    for chosen in (decode_config, linear_config, row_config):
        chosen.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the file to write; default: where the kernels look")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="tune for these only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    load = configs.load
    begin = time.monotonic()
    tuner, trials = Tuner(device), all_trials(arguments.batches)
    tuner.compile(trials)
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    for trial in trials:
        tuner.tune(trial)
    for batch in BATCHES:
        print(f"batch {batch}: {tuner.milliseconds(batch):.4f} ms a step")
    configs.load = load
    configs.save(device, tuner.found, arguments.output)
    print(f"{arguments.output or configs.path_of(device)} written after {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
