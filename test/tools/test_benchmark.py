"""The load generator, against a small server whose timing is known."""

import asyncio
import csv
import io
import json
import random
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from support.server_process import CHECKPOINT, PROMPT_WAV

from light_tts.tools.bench import command as benchmark
from light_tts.tools.bench import figures
from light_tts.tools.bench.client import Outcome
from light_tts.tools.bench.load import arrivals, open_loop
from light_tts.tools.bench.playback import Playback, play
from light_tts.tools.bench.plot import curve, draw
from light_tts.tools.bench.search import Goal, find_highest
from light_tts.tools.bench.workload import TEXT_OF_16_TOKENS, TEXTS_OF_20_TOKENS, recording

LATE = 0.25  # seconds that a busy machine may add to a time


class FakeServer:
    """Answers like Light-TTS: a request holds one of `slots` for `first` seconds, then come `pieces` of
    half a second, `gap` seconds apart. What was asked is in `asked`. Some texts make it fail."""

    def __init__(self, slots: int = 1000, first: float = 0.02, pieces: int = 3, gap: float = 0.0) -> None:
        self.first, self.gap, self.piece = first, gap, bytes(48_000 // 2)
        self.pieces = pieces
        self.asked: list[dict] = []
        self.under_way = self.most_under_way = 0
        self._slots = asyncio.Semaphore(slots)
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)

    async def _serve(self, started: threading.Event) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/inference_zero_shot", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        await self._stop.wait()
        await runner.cleanup()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        is_json = request.content_type == "application/json"
        fields = dict(await request.json() if is_json else await request.post())
        if not is_json:
            fields["prompt_wav"] = fields["prompt_wav"].file.read()
        self.asked.append(fields)
        if fields["tts_text"] == "refuse":
            return web.Response(status=429)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._speak(request, fields["tts_text"])
        finally:
            self.under_way -= 1

    async def _speak(self, request: web.Request, text: str) -> web.StreamResponse:
        async with self._slots:
            await asyncio.sleep(self.first)
        response = web.StreamResponse(headers={"X-Sample-Rate": "24000"})
        await response.prepare(request)
        for number in range(0 if text == "silence" else self.pieces):
            if number:
                await asyncio.sleep(self.gap)
            await response.write(self.piece)
            if text == "break off":
                request.transport.close()
        return response


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """Half seconds of audio as fast as they go, the first after 0.02 s."""
    running = FakeServer()
    yield running
    running.close()


def bench(fake: FakeServer, *options: str) -> int:
    return benchmark.main(["--url", fake.url, "--stream", "True", *options])


def texts_file(folder: Path, *texts: str) -> str:
    path = folder / "texts.txt"
    path.write_text("\n".join(texts) + "\n")
    return str(path)


# ---------------------------------------------------------------- playback


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], Playback(0, 0.0, 0.0)),
        ([(3.0, 1.0)], Playback(0, 0.0, 0.0)),
        # Each piece comes while the one before it plays.
        ([(1.0, 1.0), (1.5, 1.0), (2.5, 1.0)], Playback(0, 0.0, 1.0)),
        # Just in time.
        ([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)], Playback(0, 0.0, 1.0)),
        # Dry at 2.0, again playing from 2.25 to 3.25.
        ([(1.0, 1.0), (2.25, 1.0), (3.0, 1.0)], Playback(1, 0.25, 1.25)),
        # Dry at 2.0 until 2.5 and at 3.5 until 4.25.
        ([(1.0, 1.0), (2.5, 1.0), (4.25, 1.0)], Playback(2, 1.25, 1.75)),
        # What came early makes up for what comes late.
        ([(1.0, 1.0), (1.0, 2.0), (4.0, 1.0), (5.0, 1.0)], Playback(0, 0.0, 3.0)),
    ],
)
def test_a_player_that_starts_at_once(pieces, expected: Playback):
    assert play(pieces) == expected


def test_the_stall_is_the_smallest_start_up_buffer_that_avoids_every_underrun():
    generator = random.Random(0)
    for _ in range(200):
        now, pieces = 0.0, []
        for _ in range(generator.randint(1, 20)):
            now += generator.expovariate(1.0)
            pieces.append((now, generator.uniform(0.0, 2.0)))
        found = play(pieces)

        def runs_dry(wait: float, pieces: list[tuple[float, float]] = pieces) -> bool:
            before = [sum(audio for _, audio in pieces[:index]) for index in range(len(pieces))]
            start = pieces[0][0] + wait
            return any(at > start + played for (at, _), played in zip(pieces, before, strict=True))

        assert not runs_dry(found.stall + 1e-9)
        assert runs_dry(found.stall - 1e-6) or found.stall == 0
        assert (found.underruns > 0) == runs_dry(0.0) == (found.stall > 0)


# ---------------------------------------------------------------- arrivals


def test_arrivals_are_poisson():
    """The mean of 20 000 exponential gaps is within 3 % of 1 / rate (4 standard errors), the standard
    deviation too, and their share above the mean is 1/e; the counts of disjoint seconds have a variance like
    their mean."""
    times = np.array(arrivals(8.0, 1, number=20_000))
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.03)
    assert (gaps > 1 / 8).mean() == pytest.approx(np.exp(-1), rel=0.03)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.15)


def test_arrivals_are_repeatable_and_end_in_time():
    times = arrivals(50.0, 3, until=10.0)
    assert times == arrivals(50.0, 3, until=10.0) != arrivals(50.0, 4, until=10.0)
    assert times == pytest.approx(arrivals(50.0, 3, number=len(times)))
    assert times[0] > 0 and times == sorted(times) and 9 < times[-1] < 10


def test_open_loop_sends_on_time_whatever_the_answers_do():
    async def send(index: int, due: float) -> Outcome:
        outcome = Outcome(index, due, time.perf_counter())
        await asyncio.sleep(0.3)
        outcome.latency = 0.3
        return outcome

    run = asyncio.run(open_loop(send, [0.0, 0.1, 0.11, 0.2], lead_in=0.05))
    assert [outcome.index for outcome in run.outcomes] == [1, 2, 3]
    assert all(0 <= outcome.start - outcome.due < LATE for outcome in run.outcomes)
    assert figures.most_under_way(run.outcomes) == 3
    assert 0.44 < run.wall < 0.45 + LATE
    assert run.lags and not run.given_up


def test_open_loop_gives_up_what_is_hopeless():
    ended = []

    async def send(index: int, due: float) -> Outcome:
        try:
            await asyncio.sleep(0.01 if index == 0 else 30)
        finally:
            ended.append(index)
        return Outcome(index, due, due)

    start = time.perf_counter()
    run = asyncio.run(open_loop(send, [0.0, 0.0, 60.0], hopeless=lambda outcomes: len(outcomes) == 1))
    assert time.perf_counter() - start < 5
    assert run.given_up and [outcome.index for outcome in run.outcomes] == [0]
    assert sorted(ended) == [0, 1]


@pytest.mark.parametrize("step", [0.001, 0.0], ids=["soon one after the other", "all at once"])
def test_a_client_that_is_busy_with_itself_is_noticed(step: float):
    async def send(index: int, due: float) -> Outcome:
        start = time.perf_counter()
        time.sleep(0.1)
        return Outcome(index, due, start, latency=0.1, audio=1.0)

    point = figures.summarize(asyncio.run(open_loop(send, [step * index for index in range(4)])))
    assert point["late"]["max"] > 0.25 and point["lag"]["max"] > 0.25
    assert "this client" in figures.slow_client(point)
    point["late"] = point["lag"] = figures.spread([0.001])
    assert figures.slow_client(point) == ""


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("body", ["form", "json"])
def test_a_run_sends_what_it_is_told_and_measures_it(fake, tmp_path: Path, capsys, body: str):
    report = tmp_path / "report.json"
    texts = texts_file(tmp_path, "Hello there.", "", "Good morning.")
    options = ("--number", "4", "--concurrency", "2", "--warmup", "3", "--new_tokens", "40", "--seed", "7")
    assert bench(fake, *options, "--body", body, "--text_file", texts, "--json", str(report)) == 0
    assert len(fake.asked) == 3 + 4
    asked = sorted(fake.asked[3:], key=lambda fields: int(fields["seed"]))
    assert [int(fields["seed"]) for fields in asked] == [7, 8, 9, 10]
    assert [fields["tts_text"] for fields in asked] == ["Hello there.", "Good morning."] * 2
    assert {str(fields["min_new_tokens"]) for fields in asked} == {"40"}
    found = json.loads(report.read_text())
    assert found["succeeded"] == found["requests"] == 4 and not found["errors"]
    assert found["audio_seconds"] == pytest.approx(4 * 1.5)
    assert found["underrun_requests"] == 0 and found["most_under_way"] == 2
    for name in ("latency", "first_audio"):
        values = [found[name][quantile] for quantile in ("min", "p50", "p90", "p95", "p99", "max")]
        assert values == sorted(values) and 0.02 < values[0] < 0.02 + LATE
    printed = capsys.readouterr()
    for word in ("latency", "first audio", "RTF", "requests/s", "P50", "P95", "P99", "client's lag"):
        assert word in printed.out
    assert "4/4 done, 0 failed" in printed.err


def test_a_streamed_answer_that_comes_too_slowly_runs_dry(tmp_path: Path, capsys):
    """Three half seconds of audio 0.7 s apart: dry for 0.2 s twice."""
    fake, report = FakeServer(gap=0.7), tmp_path / "report.json"
    assert bench(fake, "--number", "2", "--concurrency", "2", "--records", "--json", str(report)) == 0
    fake.close()
    found = json.loads(report.read_text())
    assert found["underrun_requests"] == 2 and found["underruns"] == 4
    assert found["stall_seconds"] == pytest.approx(2 * 0.4, abs=LATE)
    assert found["buffer"]["p50"] == pytest.approx(0.4, abs=LATE)
    assert found["gap"]["p95"] == pytest.approx(0.7, abs=LATE)
    assert found["first_audio"]["max"] < 0.02 + LATE
    for record in found["records"]:
        assert sum(size for _, size in record["pieces"]) == 3 * 24_000
        assert record["pieces"][0][0] == record["first_audio"]
        assert record["playback"]["underruns"] == 2
    assert "players run dry     2 (4 underruns" in capsys.readouterr().out


def test_errors_are_counted_by_kind_and_fail_the_run(fake, tmp_path: Path, capsys):
    texts = texts_file(tmp_path, "refuse", "break off", "silence", "refuse")
    assert bench(fake, "--number", "5", "--text_file", texts, "--csv", str(tmp_path / "runs.csv")) == 1
    printed = capsys.readouterr().out
    for kind in ("HTTP 429: 3", "incomplete answer: 1", "no audio: 1", "0 of 5 complete"):
        assert kind in printed
    [row] = csv.DictReader((tmp_path / "runs.csv").open())
    assert row["failed"] == "5" and row["latency_p95"] == ""


def test_an_answer_that_takes_too_long_is_a_timeout(capsys):
    fake = FakeServer(first=5.0)
    assert bench(fake, "--number", "1", "--timeout", "0.1") == 1
    fake.close()
    assert "timeout: 1" in capsys.readouterr().out


def test_open_loop_for_a_time(fake, tmp_path: Path):
    report = tmp_path / "report.json"
    options = ("--rate", "40", "--duration", "1", "--lead_in", "0.25", "--arrival_seed", "5")
    assert bench(fake, *options, "--json", str(report)) == 0
    times = arrivals(40.0, 5, until=1.25)
    assert len(fake.asked) == len(times)
    found = json.loads(report.read_text())
    assert found["requests"] == sum(at >= 0.25 for at in times)
    assert found["mode"] == "open" and found["rate"] == 40
    assert found["late"]["p50"] < LATE


def test_closed_loop_for_a_time(fake, tmp_path: Path):
    report = tmp_path / "report.json"
    assert bench(fake, "--concurrency", "3", "--duration", "0.5", "--json", str(report)) == 0
    found = json.loads(report.read_text())
    assert 0.5 < found["wall_seconds"] < 0.5 + 0.02 + LATE
    assert 3 < found["requests"] <= 3 * 26 and fake.most_under_way == 3


def test_sweep_gives_a_line_for_each_number_of_clients(fake, tmp_path: Path, capsys):
    report, table = tmp_path / "report.json", tmp_path / "runs.csv"
    for _ in range(2):
        options = ("--sweep", "1,2,5", "--number", "7", "--json", str(report), "--csv", str(table))
        assert bench(fake, *options) == 0
    heading, *lines = capsys.readouterr().out.splitlines()[:4]
    assert heading.split()[:3] == ["load", "requests", "failed"]
    assert [line.split()[:3] for line in lines] == [["1", "7", "0"], ["2", "7", "0"], ["5", "15", "0"]]
    points = json.loads(report.read_text())["points"]
    assert [point["concurrency"] for point in points] == [1, 2, 5]
    assert [point["most_under_way"] for point in points] == [1, 2, 5]
    rows = list(csv.DictReader(table.open()))
    assert [row["concurrency"] for row in rows] == ["1", "2", "5"] * 2
    assert float(rows[5]["latency_p95"]) == points[2]["latency"]["p95"]


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("limit", [0.013, 0.5, 3.0, 7.3, 100.0])
def test_search_finds_the_limit_to_the_precision(limit: float):
    tried: list[float] = []

    async def probe(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = asyncio.run(find_highest(probe, 2.0, 0.1, 0.005))
    assert limit / 1.1 - 1e-9 <= found <= limit
    assert tried[0] == 2.0 and found in tried and len(tried) < 16


def test_search_ends_where_nothing_is_fast_enough():
    tried: list[float] = []

    async def probe(rate: float) -> bool:
        tried.append(rate)
        return False

    assert asyncio.run(find_highest(probe, 1.0, 0.1, 0.25)) == 0.0
    assert tried == [1.0, 0.5, 0.25]


def test_a_run_without_requests_has_no_figures(fake, tmp_path: Path, capsys):
    options = (
        "--rate",
        "0.001",
        "--duration",
        "0.1",
        "--lead_in",
        "0.1",
        "--csv",
        str(tmp_path / "runs.csv"),
    )
    assert bench(fake, *options, "--csv", str(tmp_path / "runs.csv")) == 0
    assert "0 of 0 complete" in capsys.readouterr().out


def test_what_is_hopeless_would_have_missed_the_goal():
    """Whatever the requests do that are still to come."""
    goal = Goal(first_audio=0.4)
    for planned in (1, 10, 20, 21, 40, 333):
        for late in range(planned + 1):
            times = [0.5] * late + [0.1] * (planned - late)
            outcomes = [Outcome(0, 0.0, 0.0, first_audio=time) for time in times]
            if goal.is_hopeless(outcomes[:late], planned):
                assert figures.spread(times)["p95"] > 0.4
        assert goal.is_hopeless(outcomes, planned) or planned == 1
    dry = Outcome(0, 0.0, 0.0, first_audio=0.1, playback=Playback(1, 0.2, 0.3))
    assert goal.is_hopeless([dry], 1000)
    assert goal.is_hopeless([Outcome(0, 0.0, 0.0, error="timeout")], 1000)


def test_find_rate_finds_what_the_server_can_do(tmp_path: Path, capsys):
    """One slot that is held for 0.02 s: 50 requests a second and no more."""
    fake, report = FakeServer(slots=1, first=0.02, pieces=1), tmp_path / "report.json"
    options = ("--find_rate", "--rate", "12", "--duration", "0.6", "--slo_first_audio", "0.15")
    assert bench(fake, *options, "--precision", "0.4", "--json", str(report)) == 0
    fake.close()
    found = json.loads(report.read_text())
    assert 12 <= found["highest_rate"] <= 96
    assert [point["rate"] for point in found["points"]][:2] == [12, 24]
    printed = capsys.readouterr().out
    assert f"highest rate: {found['highest_rate']:.2f} requests/s" in printed
    assert "first audio P95" in printed and printed.splitlines()[1].endswith("ok")


def test_find_rate_without_a_server_finds_none(capsys):
    options = ("--url", "http://127.0.0.1:1", "--find_rate", "--rate", "50", "--duration", "0.1")
    assert benchmark.main([*options]) == 1
    assert "highest rate: 0.00" in capsys.readouterr().out


# ---------------------------------------------------------------- presets


def test_presets_have_the_tokens_that_they_say():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "CosyVoice-BlankEN")
    assert [len(tokenizer(text).input_ids) for text in TEXTS_OF_20_TOKENS] == [20] * 4
    assert len(tokenizer(TEXT_OF_16_TOKENS).input_ids) == 16


@pytest.mark.parametrize(("preset", "tokens", "seconds"), [("baseline16s", 400, 3.0), ("short5s", 125, 3.5)])
def test_preset_sets_what_the_command_line_does_not(fake, preset: str, tokens: int, seconds: float):
    assert bench(fake, "--preset", preset, "--number", "1") == 0
    assert bench(fake, "--preset", preset, "--number", "1", "--new_tokens", "9") == 0
    asked, changed = fake.asked
    assert asked["tts_text"] in TEXTS_OF_20_TOKENS and asked["prompt_text"] == TEXT_OF_16_TOKENS
    assert asked["min_new_tokens"] == asked["max_new_tokens"] == str(tokens)
    assert changed["min_new_tokens"] == "9"
    with wave.open(io.BytesIO(asked["prompt_wav"])) as sent:
        assert sent.getnframes() / sent.getframerate() == seconds


@pytest.mark.parametrize("seconds", [0.5, 3.0, 10.0])
def test_recording_is_cut_or_repeated(seconds: float):
    with wave.open(io.BytesIO(recording(PROMPT_WAV, seconds))) as made:
        sound = made.readframes(made.getnframes())
        assert made.getnframes() == round(seconds * made.getframerate())
    with wave.open(str(PROMPT_WAV)) as source:
        whole = source.readframes(source.getnframes())
    assert sound == (whole * 3)[: len(sound)]


# ---------------------------------------------------------------- arguments and pictures


@pytest.mark.parametrize(
    "options",
    [
        ("--sweep", "1,2", "--rate", "3"),
        ("--find_rate",),
        ("--number", "3", "--duration", "3"),
        ("--rate", "3", "--lead_in", "1"),
        ("--rate", "0"),
        ("--sweep", "1,x"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: tuple[str, ...], capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main([*options])
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_recording_that_cannot_be_cut_is_named(tmp_path: Path, capsys):
    path = tmp_path / "voice.wav"
    path.write_bytes(b"not a recording")
    assert benchmark.main(["--prompt_wav", str(path), "--prompt_text", "", "--prompt_seconds", "3"]) == 2
    assert str(path) in capsys.readouterr().err


def test_plot_takes_the_points_that_have_a_value():
    rows = [{"rate": "4", "rtf_avg": "0.5"}, {"rate": "2", "rtf_avg": ""}, {"rate": "1", "rtf_avg": "0.25"}]
    assert curve(rows, "rate", "rtf_avg") == [(1.0, 0.25), (4.0, 0.5)]
    with pytest.raises(ValueError, match="same mode"):
        draw([{"mode": "open"}, {"mode": "closed"}], Path("never.png"))


def test_plot_draws_a_sweep(fake, tmp_path: Path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "sweep.png"
    assert bench(fake, "--sweep", "1,2", "--number", "2", "--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
