"""Generates the teacher's speech in several processes, distributed over all visible GPUs.

    python -m training.corpus.generate [--processes N] [--minutes 9] [--work build/train_mini]

Writes speech/NNNNN.npz in the work folder, SHARD utterances each, in order. Existing files are skipped, so an
interrupted run can be resumed. On a GPU processes take turns unless CUDA MPS is running (start
`nvidia-cuda-mps-control -d` before; measured on one H100 with 16 cores, 14 processes and MPS: 380 times real
time alongside three trainings, 440 alongside shorter ones).
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing import Queue
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from training.corpus.packages import voices_folder
from training.corpus.speakers import speakers, style, voice_names
from training.corpus.teacher import SAMPLE_RATE, Teacher, model_file
from training.work import argument_parser, read_lines

SHARD = 128
SECONDS_A_REPORT = 10


def shard_file(work: Path, number: int) -> Path:
    return work / "speech" / f"{number:05}.npz"


def work_off(work: Path, device: str, shards, done, deadline: float) -> None:
    """One process: takes (number, utterances) from the queue `shards` until it gets None or time is up, and
    puts (utterances, seconds of speech) of each into `done`."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)  # keep this process off the other GPUs
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    teacher = Teacher(work, torch.device(device))
    folder = voices_folder(work)
    known = {speaker.name: speaker for speaker in speakers(voice_names(folder))}
    while (shard := shards.get()) is not None and time.time() < deadline:
        number, batch = shard
        spoken = []
        for utterance in batch:
            speaker = known[utterance["speaker"]]
            spoken.append(teacher.speak(utterance["phonemes"], style(folder, speaker), speaker.shift))
        target = shard_file(work, number)
        unfinished = target.with_suffix(".part.npz")
        np.savez(
            unfinished,
            id=[utterance["id"] for utterance in batch],
            wave=np.concatenate([(s.wave.clip(-1, 1) * 32767).astype(np.int16) for s in spoken]),
            samples=[len(s.wave) for s in spoken],
            durations=np.concatenate([s.durations for s in spoken]).astype(np.float32),
            phonemes=[len(s.durations) for s in spoken],
            f0=np.concatenate([s.f0 for s in spoken]).astype(np.float32),
            steps=[len(s.f0) for s in spoken],
        )
        unfinished.replace(target)
        done.put((len(batch), sum(len(s.wave) for s in spoken) / SAMPLE_RATE))


def default_processes() -> int:
    """On a GPU each process is limited by its core; two cores are reserved."""
    return max((os.cpu_count() or 1) - 2, 1) if torch.cuda.is_available() else 2


def devices(processes: int, gpus: int) -> list[str]:
    """Return the device of each process, cycling through the GPUs."""
    return [f"cuda:{number % gpus}" if gpus else "cpu" for number in range(processes)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no shard after so long")
    parser.add_argument("--shards", type=int, help="at most so many in this run, e.g. to try it")
    args = parser.parse_args()
    model_file(args.work)  # once, before all processes need it
    utterances = read_lines(args.work / "utterances.jsonl")
    (args.work / "speech").mkdir(exist_ok=True)
    batches = enumerate(utterances[start : start + SHARD] for start in range(0, len(utterances), SHARD))
    missing = ((number, batch) for number, batch in batches if not shard_file(args.work, number).exists())
    missing = list(islice(missing, args.shards))
    wanted = sum(len(batch) for _, batch in missing)
    context = multiprocessing.get_context("spawn")
    shards, done = context.Queue(), context.Queue()
    for shard in [*missing, *[None] * args.processes]:
        shards.put(shard)
    deadline = time.time() + 60 * args.minutes
    processes = [
        context.Process(target=work_off, args=(args.work, device, shards, done, deadline), daemon=True)
        for device in devices(args.processes, torch.cuda.device_count())
    ]
    begun = time.monotonic()
    for process in processes:
        process.start()
    spoken, seconds, reported_at = 0, 0.0, begun
    for utterances, duration in reports(done, processes):
        spoken, seconds, now = spoken + utterances, seconds + duration, time.monotonic()
        if now - reported_at >= SECONDS_A_REPORT or spoken == wanted:
            reported_at, passed = now, now - begun
            print(
                f"{spoken} of {wanted} utterances, {seconds / 3600:.2f} h of speech after "
                f"{passed:.0f} s: {seconds / passed:.0f} times real time",
                flush=True,
            )
    shards.cancel_join_thread()  # do not wait for items that nobody took
    if failed := [process.pid for process in processes if process.exitcode]:
        sys.exit(f"{len(failed)} of {len(processes)} processes failed; their messages are above")


def reports(done: Queue, processes: list[BaseProcess]) -> Iterator[tuple[int, float]]:
    """Yield (utterances, seconds of speech) as they arrive, until all processes have ended."""
    while True:
        running = any(process.is_alive() for process in processes)
        try:
            yield done.get(timeout=1.0)
        except queue.Empty:
            if not running:
                return


if __name__ == "__main__":
    main()
