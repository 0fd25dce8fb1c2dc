"""The training loop shared by all trainings: a step recorded as a CUDA graph, a learning rate schedule based
on time, a running average of the weights, and a file from which the next run resumes."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from training.work import argument_parser

Step = Callable[..., dict[str, Tensor]]

WARM_UP_STEPS = 200  # in each run, because the optimizer's moments are not saved
LOWEST_RATE = 0.02  # final learning rate as a fraction of the highest
LOG_SECONDS, SAVE_SECONDS = 15.0, 60.0
STEPS_AHEAD = 16  # maximum number of steps that the host may run ahead of the GPU


def training_parser(description: str, minutes: float) -> argparse.ArgumentParser:
    """`minutes`: default duration of the whole training on one H100."""
    parser = argument_parser(description)
    parser.add_argument("--minutes", type=float, default=minutes, help="of this run")
    parser.add_argument(
        "--total",
        type=float,
        default=minutes,
        help="minutes of all runs together: the learning rate falls over them",
    )
    parser.add_argument("--shards", type=int, help="take so many shards of speech only")
    return parser


class Learner:
    """Optimizes one module: AdamW with gradient clipping, and a running average of the weights."""

    def __init__(
        self,
        module: nn.Module,
        rate: float,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        clip: float = 1.0,
        average: float = 0.999,
    ) -> None:
        self.module, self._highest, self._clip, self._average = module, rate, clip, average
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        device = self._parameters[0].device
        self._rate = torch.tensor(0.0, device=device)
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=self._rate,
            betas=betas,
            weight_decay=weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self._averaged = [p.detach().clone() for p in self._parameters]

    def set_rate(self, share: float) -> None:
        """Set the learning rate to `share` of the highest."""
        self._rate.fill_(share * self._highest)

    def learn(self, loss: Tensor) -> Tensor:
        """Make one step; return the norm of the gradient before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
        self._optimizer.step()
        torch._foreach_lerp_(self._averaged, [p.detach() for p in self._parameters], 1 - self._average)
        return norm

    def forget_average(self) -> None:
        """Restart the average from the current weights."""
        torch._foreach_copy_(self._averaged, [p.detach() for p in self._parameters])

    def state(self) -> dict[str, dict[str, Tensor]]:
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        model = self.module.state_dict()
        return {"model": model, "average": {**model, **dict(zip(names, self._averaged, strict=True))}}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.module.load_state_dict(state["model"])
        averaged = [state["average"][name] for name, p in self.module.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for own, value in zip(self._averaged, averaged, strict=True):
                own.copy_(value)


def averaged_weights(path: Path, name: str = "model") -> dict[str, Tensor]:
    """Return the averaged weights of the module `name`, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)[name]["average"]


def recorded(step: Step, inputs: Sequence[Tensor]) -> Step:
    """Return `step` as a CUDA graph for inputs of these shapes; on a CPU `step` itself. Recording takes three
    steps."""
    if inputs[0].device.type != "cuda":
        return step
    held = [value.clone() for value in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*held)

    def replay(*values: Tensor) -> dict[str, Tensor]:
        for own, value in zip(held, values, strict=True):
            own.copy_(value, non_blocking=True)
        graph.replay()
        return results

    return replay


def train(
    name: str,
    path: Path,
    learners: Mapping[str, Learner],
    step: Step,
    draw: Callable[[], Sequence[Tensor]],
    minutes: float,
    total: float,
    check: Callable[[], str] | None = None,
    look: Callable[[], str] | None = None,
    look_minutes: float = math.inf,
) -> None:
    """Resume from `path` if it exists, and write it at the end. `step`: one training step on the tensors
    returned by `draw`, always of the same shapes. `check`: called at the end, its text is printed; `look`:
    likewise, every `look_minutes`. SIGTERM ends the training at once: the file is written, nothing is
    checked, the process exits."""
    spent, count = 0.0, 0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        spent, count = saved["minutes"], saved["steps"]
        for key, learner in learners.items():
            learner.load(saved[key])
        print(f"{name}: goes on at step {count}, after {spent:.1f} minutes", flush=True)

    def save(passed: float) -> None:
        unfinished = path.with_suffix(".part")
        states = {key: learner.state() for key, learner in learners.items()}
        torch.save({**states, "minutes": spent + passed, "steps": count}, unfinished)
        unfinished.replace(path)

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    for learner in learners.values():
        learner.set_rate(1 / WARM_UP_STEPS)
    run = recorded(step, draw())
    begun = logged = saved_at = looked = time.monotonic()
    own = 0
    while (passed := (time.monotonic() - begun) / 60) < minutes and not stopped.is_set():
        share = rate_share((spent + passed) / total) * min(1.0, (own + 1) / WARM_UP_STEPS)
        for learner in learners.values():
            learner.set_rate(share)
        losses = run(*draw())
        own, count = own + 1, count + 1
        if own == WARM_UP_STEPS and not spent:
            for learner in learners.values():
                learner.forget_average()
        if own % STEPS_AHEAD == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        if now - logged > LOG_SECONDS or own == 1:
            values = " ".join(f"{key} {float(value):.4f}" for key, value in losses.items())
            print(
                f"{name}: step {count}, {spent + passed:.1f} of {total:g} minutes, "
                f"{own / (now - begun):.1f} steps/s, rate {share:.3f}: {values}",
                flush=True,
            )
            logged = now
        if now - saved_at > SAVE_SECONDS:
            save(passed)
            saved_at = now
        if look and now - looked > 60 * look_minutes and minutes - passed > look_minutes / 2:
            print(f"{name}: step {count}, {spent + passed:.1f} of {total:g} minutes {look()}", flush=True)
            looked = time.monotonic()
    save((time.monotonic() - begun) / 60)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stopped.is_set():
        sys.exit(f"{name}: stopped after {count} steps")
    print(f"{name}: {path} after {count} steps {check() if check else ''}", flush=True)


def rate_share(progress: float) -> float:
    """Half a cosine from 1 to LOWEST_RATE."""
    progress = min(1.0, progress)
    return LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
