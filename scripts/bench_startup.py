"""Measures a start of the server: when each stage was ready and what it spent its time on, how long the first
requests waited for audio, and when all CUDA graphs were recorded. On a machine without a GPU there are no
graphs; the rest is the same.

PYTHONPATH=. python3 scripts/bench_startup.py                        two starts: the second finds the kernels
PYTHONPATH=. python3 scripts/bench_startup.py --clients 8 --runs 1   eight requests at a time
PYTHONPATH=. python3 scripts/bench_startup.py --model_dir DIR -- --mps off     further flags of the server

Without --model_dir, a checkpoint of the size of CosyVoice2-0.5B with random weights is used, and created if
it does not exist.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import httpx

from light_tts.common.process import free_port

ROOT = Path(__file__).resolve().parent.parent
FULL = Path("/tmp/light-tts-full")
GOLDEN = ROOT / "test" / "golden" / "cosyvoice2"
TEXT = "The day was long and bright, so we bought water for you and a train to the beach."
# as in scripts/bench_gpu.sh
FLAGS = {
    "load_trt": "False",
    "httpserver_workers": "2",
    "gpt_paral_num": "128",
    "decode_max_batch_size": "16",
    "decode_paral_num": "2",
    "stream_hop": "grow",
}
START_SECONDS = 600.0  # kernels are compiled at the first start
RECORDING_SECONDS = 180.0
STOP_SECONDS = 60.0

LINE = re.compile(r"^(\S+ \S+) \w+ ([a-z]+-?\d*)\[\d+\] (.*)$")
UP = re.compile(r"^(\S+) is up \(")
READY = re.compile(r"^(\S+) is ready: (.*)$")
KERNELS = re.compile(r"^compiled or found (\d+) kernels in ([\d.]+) s")
LEFT = re.compile(r"^(\d+) CUDA graphs are recorded, (\d+) follow while idle")
DONE = re.compile(r"^recorded (\d+) CUDA graphs in ([\d.]+) s while idle")


@dataclass
class Stage:
    """The start of a stage as its log describes it. Times are seconds after the start of the server."""

    up: float = 0.0
    phases: str = ""
    kernels: int = 0
    kernel_seconds: float = 0.0
    first_graphs: int = 0
    later_graphs: int = 0
    all_recorded: float | None = None


@dataclass
class Answer:
    """A request. `sent`: seconds after the start; `first_audio`, `whole`: seconds after it was sent."""

    sent: float
    first_audio: float
    whole: float


@dataclass
class Start:
    """The measurements of one start."""

    ready: float
    stages: dict[str, Stage]
    answers: list[Answer] = field(default_factory=list)
    all_recorded: float | None = None
    recorded_answers: list[Answer] = field(default_factory=list)


class Server:
    """A server started by this script. Its output goes to a file."""

    def __init__(self, model_dir: Path, folder: Path, flags: list[str]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._output = folder / "server.log"
        command = [sys.executable, "-m", "light_tts.server.api_server", "--model_dir", str(model_dir)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--log_dir", ""]
        command += ["--spk_dir", str(folder / "voices")]
        command += [word for name, value in FLAGS.items() for word in (f"--{name}", value)] + flags
        self.wall = datetime.now()
        self.begun = time.monotonic()
        with self._output.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def wait_until_ready(self) -> float:
        """Return the seconds from the start to the first positive answer. Exits if there is none."""
        with httpx.Client(base_url=self.url, timeout=5.0) as http:
            while self.seconds() < START_SECONDS:
                if self._process.poll() is not None:
                    break
                try:
                    if http.get("/readiness").status_code == 200:
                        return self.seconds()
                except httpx.HTTPError:
                    pass
                time.sleep(0.02)
        self.stop()
        sys.exit(f"the server did not start:\n{self._output.read_text(errors='replace')[-4000:]}")

    def stages(self) -> dict[str, Stage]:
        """Return what the log says so far."""
        found: dict[str, Stage] = {}
        for line in self._output.read_text(errors="replace").splitlines():
            if not (match := LINE.match(line)):
                continue
            when, name, text = match.groups()
            after = (datetime.fromisoformat(when) - self.wall).total_seconds()
            if up := UP.match(text):
                found.setdefault(up[1], Stage()).up = after
            elif ready := READY.match(text):
                found.setdefault(name, Stage()).phases = ready[2]
            elif kernels := KERNELS.match(text):
                stage = found.setdefault(name, Stage())
                stage.kernels += int(kernels[1])
                stage.kernel_seconds += float(kernels[2])
            elif left := LEFT.match(text):
                stage = found.setdefault(name, Stage())
                stage.first_graphs, stage.later_graphs = int(left[1]), int(left[2])
            elif DONE.match(text):
                found.setdefault(name, Stage()).all_recorded = after
        return found

    def wait_until_recorded(self) -> float | None:
        """Wait until every stage that records graphs has recorded all; return the seconds from the start, or
        None if there are none or they do not get finished."""
        deadline = time.monotonic() + RECORDING_SECONDS
        while time.monotonic() < deadline:
            recording = [stage for stage in self.stages().values() if stage.later_graphs]
            times = [stage.all_recorded for stage in recording if stage.all_recorded is not None]
            if len(times) == len(recording):
                return max(times, default=None)
            time.sleep(0.2)
        return None

    def speak(self, number: int, tokens: int) -> Answer:
        """Send a streaming request with a recording. Raises httpx.HTTPError."""
        fields = {
            "tts_text": TEXT,
            "prompt_text": (GOLDEN / "prompt.txt").read_text().strip(),
            "stream": "true",
            "seed": str(number),
            "min_new_tokens": str(tokens),
            "max_new_tokens": str(tokens),
        }
        files = {"prompt_wav": ("prompt.wav", (GOLDEN / "prompt.wav").read_bytes(), "audio/wav")}
        sent = time.monotonic()
        first = None
        with httpx.stream(
            "POST", f"{self.url}/inference_zero_shot", data=fields, files=files, timeout=300.0
        ) as response:
            response.raise_for_status()
            for piece in response.iter_raw():
                if piece and first is None:
                    first = time.monotonic() - sent
        if first is None:
            raise httpx.ReadError("a response without audio")
        return Answer(sent - self.begun, first, time.monotonic() - sent)

    def speak_all(self, number: int, clients: int, tokens: int) -> list[Answer]:
        """Send `number` requests, `clients` at a time; return them in the order in which they were sent."""
        answers: list[Answer] = []
        numbers = iter(range(number))
        lock = threading.Lock()

        def client() -> None:
            while True:
                with lock:
                    mine = next(numbers, None)
                if mine is None:
                    return
                answers.append(self.speak(mine, tokens))

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(answers) < number:
            print(f"{number - len(answers)} of {number} requests failed")
        return sorted(answers, key=lambda answer: answer.sent)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def measure(args: argparse.Namespace, folder: Path) -> Start:
    """Start a server, send requests, wait for the graphs, send requests again, stop it."""
    server = Server(args.model_dir, folder, args.flags)
    try:
        start = Start(server.wait_until_ready(), {})
        start.answers = server.speak_all(args.requests, args.clients, args.new_tokens)
        start.all_recorded = server.wait_until_recorded()
        start.recorded_answers = server.speak_all(args.requests, args.clients, args.new_tokens)
        start.stages = server.stages()
        return start
    finally:
        server.stop()


def report(start: Start) -> None:
    print(f"ready after {start.ready:.1f} s")
    for name, stage in sorted(start.stages.items(), key=lambda pair: pair[1].up):
        print(f"  {name} up after {stage.up:.1f} s: {stage.phases}")
        if stage.kernels:
            print(
                f"    {stage.kernels} kernels compiled or found in {stage.kernel_seconds:.1f} s; graphs: "
                f"{stage.first_graphs} before it was up, {stage.later_graphs} later"
            )
    for title, answers in (
        ("from readiness on", start.answers),
        ("with all graphs", start.recorded_answers),
    ):
        if not answers:
            continue
        firsts = [answer.first_audio * 1000 for answer in answers]
        shown = " ".join(f"{ms:.0f}" for ms in firsts)
        print(f"first audio of each request {title}, ms: {shown}")
        whole = statistics.median(answer.whole for answer in answers) * 1000
        print(
            f"  median {statistics.median(firsts):.0f}, largest {max(firsts):.0f}; whole answer {whole:.0f}"
        )
    if start.answers:
        heard = start.answers[0].sent + start.answers[0].first_audio
        print(f"first audio of the first request {heard:.1f} s after the start")
    if start.all_recorded is not None:
        print(f"all graphs recorded {start.all_recorded:.1f} s after the start")
    elif any(stage.later_graphs for stage in start.stages.values()):
        print("not all graphs have been recorded")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_dir", type=Path, default=FULL)
    parser.add_argument("--runs", type=int, default=2, help="number of starts")
    parser.add_argument("--requests", type=int, default=20, help="requests before and after the recording")
    parser.add_argument("--clients", type=int, default=1, help="number of concurrent clients")
    parser.add_argument("--new_tokens", type=int, default=125, help="speech tokens of a response (25 per s)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("flags", nargs="*", help="further flags of the server, after --")
    args = parser.parse_args()
    if not args.model_dir.exists() and args.model_dir == FULL:
        script = ROOT / "scripts" / "make_tiny_checkpoint.py"
        subprocess.run([sys.executable, script, "--out", FULL, "--size", "full"], check=True)
    starts = []
    for number in range(args.runs):
        with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
            print(f"start {number + 1} of {args.runs}", flush=True)
            starts.append(measure(args, Path(folder)))
        report(starts[-1])
    if args.json:
        args.json.write_text(json.dumps([asdict(start) for start in starts], indent=1))


if __name__ == "__main__":
    main()
