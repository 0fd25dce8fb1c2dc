"""Everything that needs a GPU, unattended: generation, encoding and the three trainings side by side.

    setsid python -m training.train_all --minutes 27 [--languages en zh] [--only flow vocoder] [--out OUT]

Begins with packages.py, sentences.py (mandarin.py), utterances.py and text_tokenizer.py where what they make
is not there, which takes no GPU and is better done before. Needs the training files of the speech tokenizer
and the speaker encoder; the other trainings go on from their files where there are any. Uses
all GPUs that it sees: the vocoder has the last one for itself once all is spoken, the language model and the
flow share the first. Generation runs beside the trainings, which begin with the first hours of speech; the
language model and the flow are started again when all is encoded, the vocoder for its last minutes, in which
it learns from the flow's mels. Every minute --out receives the weights in half precision (each training
file below 16 MB) and the ends of all logs in report.txt. SIGTERM or Ctrl-C at any time: what was trained
until then is in --out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch

from training.checkpoint import halves, training_file
from training.corpus.mandarin import FILE as MANDARIN
from training.lm.weights import BEST
from training.work import language_parser

TRAINED = {  # by module
    "language_model": "training.lm.language_model",
    "flow": "training.flow.flow_matching",
    "vocoder": "training.vocoder.vocoder",
}
SPARE_CORES = 6  # for encoding and training beside the generation
PACKED = (*TRAINED, BEST)
BEGIN_SHARDS = 60  # of speech with codes, about 12 h: enough to begin with
VOCODER_SHARDS = 100  # about 20 h: it needs no more
VOCODER_BATCH = 32  # 16 leave a whole H200 idle most of the time
FLOW_MELS = 0.6  # share of the vocoder's mels that the flow makes in the last minutes
FLOW_MEL_SHARDS = 40  # about 8 h, which the flow makes in less than a minute
PACK_SECONDS = 60.0
LAST_SECONDS = 30.0  # for the last packing
# The trainings measure themselves at their end: so many minutes before the others do they stop.
CHECK_MINUTES = {"language_model": 1.0, "flow": 0.7, "vocoder": 0.3}
LOAD_MINUTES = 0.8  # from the start of a training to its first step
REPORT_LINES = 4


@contextlib.contextmanager
def shared_gpus() -> Iterator[bool]:
    """CUDA MPS for all processes that are started within: whether it runs. Without it they take turns."""
    control = shutil.which("nvidia-cuda-mps-control")
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        if control:
            os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        runs = bool(control) and subprocess.run([control, "-d"]).returncode == 0
        if not runs:
            for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
                os.environ.pop(name, None)
        try:
            yield runs
        finally:
            if runs:
                subprocess.run([control], input=b"quit\n", timeout=20)


class Stopped(Exception):
    """Somebody wants the run to end."""


class Steps:
    """The processes of a run, each with its log, and the clock."""

    def __init__(self, work: Path, out: Path, minutes: float) -> None:
        self._work, self._out = work, out
        self._begun = time.monotonic()
        self._end = self._begun + 60 * minutes - LAST_SECONDS
        self._running: dict[str, subprocess.Popen] = {}
        self._packed_at = 0.0
        self._packed: dict[str, int] = {}  # when the training file that was packed last was written
        (work / "logs").mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)

    @property
    def minutes_left(self) -> float:
        return (self._end - time.monotonic()) / 60

    def say(self, text: str) -> None:
        with (self._work / "logs" / "run.log").open("a") as log:
            log.write(f"{time.monotonic() - self._begun:.0f} s: {text}\n")

    def start(self, name: str, module: str, *options: object, gpu: int | None = None) -> str:
        """Start a step on one GPU, or with all of them in sight -> `name`."""
        command = [sys.executable, "-m", module, "--work", self._work, *options]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with (self._work / "logs" / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [str(part) for part in command], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self._running[name] = process
        self.say(f"{name} begins: {' '.join(map(str, options))}")
        return name

    def train(self, name: str, module: str, *more: object, gpu: int, minutes: float, later: float = 0) -> str:
        """Start a training for `minutes`, after which its learning rate is at its lowest, or will be in
        `later` minutes."""
        path = training_file(self._work, name)
        spent = torch.load(path, map_location="cpu", weights_only=True)["minutes"] if path.exists() else 0.0
        options = ("--minutes", round(minutes, 2), "--total", round(spent + minutes + later, 2))
        return self.start(name, module, *options, *more, gpu=gpu)

    def wait(self, done: Callable[[], bool]) -> None:
        """Until `done`, or time is up; packs meanwhile. Raises Stopped when time is up."""
        while not done():
            if time.monotonic() > self._end:
                raise Stopped
            for name, process in list(self._running.items()):
                if process.poll() is not None:
                    self.say(f"{name} ended with {process.returncode}")
                    del self._running[name]
            if time.monotonic() - self._packed_at > PACK_SECONDS:
                self.pack()
            time.sleep(1)

    def wait_for(self, name: str) -> None:
        """Until this step has ended."""
        self.wait(lambda: self.ended(name))

    def ended(self, *names: str) -> bool:
        return not any(name in self._running for name in names)

    def stop(self, *names: str) -> None:
        """Let trainings save what they have, at once."""
        for name in names:
            if process := self._running.pop(name, None):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                self.say(f"{name} was stopped")

    def stop_all(self) -> None:
        self.stop(*self._running)

    def pack(self) -> None:
        """Writes the weights and the report into `out`."""
        self._packed_at = time.monotonic()
        for name in PACKED:
            path = training_file(self._work, name)
            target = self._out / path.name
            if path.exists() and path.stat().st_mtime_ns != self._packed.get(name):
                # Of the file that is read: a training may write another while it is.
                self._packed[name] = path.stat().st_mtime_ns
                pack(path, target)
        lines = []
        for log in sorted((self._work / "logs").glob("*.log")):
            last = log.read_text(errors="replace").splitlines()
            lines += [f"== {log.stem}", *last[-(40 if log.stem == "run" else REPORT_LINES) :]]
        (self._out / "report.txt").write_text("\n".join(lines) + "\n")


def pack(path: Path, target: Path) -> None:
    """A training file with the averaged weights alone, in half precision: training goes on from it."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    packed = {}
    for name, value in saved.items():
        if isinstance(value, dict):
            average = halves(value["average"])
            value = {"model": average, "average": average}
        packed[name] = value
    unfinished = target.with_suffix(".part")
    torch.save(packed, unfinished)
    unfinished.replace(target)


def prepare(steps: Steps, work: Path, languages: Sequence[str], hours: float) -> None:
    """What is to be spoken, where it is not there yet. Raises Stopped where a step fails."""
    spoken = ("--languages", *languages)
    files = {"en": ("sentences", "sentences.jsonl"), "zh": ("mandarin", MANDARIN)}
    plan = [(f"training.corpus.{module}", file, ()) for module, file in map(files.__getitem__, languages)]
    plan.append(("training.corpus.utterances", "utterances.jsonl", (*spoken, "--hours", hours)))
    if any(not (work / file).exists() for _, file, _ in plan):
        steps.wait_for(steps.start("packages", "training.corpus.packages", *spoken))
    for module, file, options in plan:
        if not (work / file).exists():
            steps.wait_for(steps.start(module.rpartition(".")[2], module, *options))
        if not (work / file).exists():
            steps.say(f"{file} is missing")
            raise Stopped
    steps.wait_for(steps.start("text_tokenizer", "training.lm.text_tokenizer", *spoken))


def run(
    steps: Steps, work: Path, gpus: int, only: Collection[str], generation_minutes: float, flow_mels: float
) -> None:
    """The whole plan, for the trainings `only`. Raises Stopped when time is up."""
    first, last = 0, gpus - 1

    def count(folder: str) -> int:
        return len(list((work / folder).glob("?????.npz")))

    def left(name: str) -> float:
        return steps.minutes_left - LOAD_MINUTES - CHECK_MINUTES[name]

    def train_readers() -> None:
        """Those that need codes."""
        for name in readers:
            steps.train(name, TRAINED[name], gpu=first, minutes=left(name))

    def train_vocoder(shards: int, *more: object, later: float = 0.0) -> None:
        options = ("--shards", shards, "--batch", VOCODER_BATCH, *more)
        minutes = left("vocoder") - later
        steps.train("vocoder", TRAINED["vocoder"], *options, gpu=last, minutes=minutes, later=later)

    readers = [name for name in ("language_model", "flow") if name in only]
    processes = max((os.cpu_count() or 1) - SPARE_CORES, 1)
    generation = steps.start(
        "generate", "training.corpus.generate", "--processes", processes, "--minutes", generation_minutes
    )
    encoding = [
        steps.start(
            f"encode_{gpu}",
            "training.codec.encode",
            "--part",
            f"{gpu}/{gpus}",
            "--wait",
            generation_minutes + 1,
            gpu=gpu,
        )
        for gpu in range(gpus)
    ]
    steps.wait(lambda: count("codes") >= BEGIN_SHARDS or steps.ended(*encoding))
    train_readers()
    if "vocoder" in only:
        steps.wait(lambda: count("speech") >= VOCODER_SHARDS or steps.ended(generation))
        train_vocoder(VOCODER_SHARDS, later=flow_mels)
    steps.wait(lambda: steps.ended(generation))
    # Nothing more is spoken: the encoding ends when nothing is left.
    steps.wait(lambda: count("codes") >= count("speech") or steps.ended(*encoding))
    steps.stop(*encoding, *readers)
    train_readers()
    if "vocoder" in only and flow_mels:
        steps.wait(lambda: left("vocoder") < flow_mels)
        steps.stop("vocoder")
        train_vocoder(FLOW_MEL_SHARDS, "--flow_mels", FLOW_MELS)
    steps.wait(lambda: steps.ended(*TRAINED))


def main() -> None:
    parser = language_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=27.0, help="of the whole run")
    parser.add_argument("--hours", type=float, default=40.0, help="to be spoken, unless that is said")
    parser.add_argument("--only", nargs="+", choices=TRAINED, default=list(TRAINED), help="train these")
    parser.add_argument("--generation_minutes", type=float, default=5.0)
    parser.add_argument(
        "--flow_mel_minutes", type=float, default=8.0, help="at the end, of the vocoder with the flow's mels"
    )
    parser.add_argument("--out", type=Path, help="(default: WORK/out)")
    args = parser.parse_args()

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    steps = Steps(args.work, args.out or args.work / "out", args.minutes)
    with shared_gpus() as shared:
        gpus = max(torch.cuda.device_count(), 1)
        steps.say(f"{gpus} GPUs, {'with' if shared else 'without'} MPS")
        try:
            prepare(steps, args.work, args.languages, args.hours)
            run(steps, args.work, gpus, args.only, args.generation_minutes, args.flow_mel_minutes)
        except Stopped:
            steps.say("time is up")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            steps.stop_all()
            steps.say("done")
            steps.pack()


if __name__ == "__main__":
    main()
