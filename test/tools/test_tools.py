"""The operator's tools, run as an operator runs them, against the real server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--new_tokens", "20")


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


# ---------------------------------------------------------------- benchmark


@pytest.mark.parametrize(("stream", "body"), [("True", "form"), ("False", "json")])
def test_benchmark_reports_every_figure_of_a_run(server, tmp_path: Path, stream: str, body: str):
    texts, report = tmp_path / "texts.txt", tmp_path / "report.json"
    texts.write_text("Hello there.\n\nGood morning.\n")
    done = run(
        *("test/benchmark.py", "--url", server.url, "--number", "4", "--concurrency", "2"),
        *("--new_tokens", "40"),
        *("--stream", stream, "--body", body, "--text_file", str(texts), "--json", str(report)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4/4 done, 0 failed" in done.stderr
    found = json.loads(report.read_text())
    assert found["succeeded"] == 4 and not found["errors"]
    assert found["audio_seconds"] == pytest.approx(4 * 40 / 25)
    assert found["requests_per_second"] > 0
    for name in ("latency", "first_audio", "rtf"):
        figures = found[name]
        assert 0 < figures["min"] <= figures["p50"] <= figures["p95"] <= figures["p99"] <= figures["max"]
    assert found["first_audio"]["max"] <= found["latency"]["max"]
    for word in ("latency", "first audio", "RTF", "requests/s", "P50", "P90", "P99"):
        assert word in done.stdout


def test_benchmark_makes_the_work_of_the_published_figures(server):
    done = run(
        *("test/benchmark.py", "--url", server.url, "--preset", "short5s", "--stream", "True"),
        *("--rate", "2", "--number", "2", "--warmup", "1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10.00 s made" in done.stdout


def test_benchmark_counts_errors_by_kind(server):
    done = run("test/benchmark.py", "--url", server.url, "--number", "3", "--tts_model_name", "nobody")
    assert done.returncode == 1
    assert "HTTP 400: 3" in done.stdout


def test_benchmark_without_a_server_says_so():
    done = run("test/benchmark.py", "--url", "http://127.0.0.1:1", "--number", "2")
    assert done.returncode == 1
    assert "no connection: 2" in done.stdout


def test_benchmark_names_the_file_that_is_missing():
    done = run("test/benchmark.py", "--text_file", "no/such/file")
    assert done.returncode == 2
    assert "no/such/file" in done.stderr


# ---------------------------------------------------------------- monitor


def test_monitor_sees_requests_and_every_process(server):
    assert run("test/benchmark.py", "--url", server.url, "--number", "2", *SHORT).returncode == 0
    done = run("scripts/monitor.py", "--url", server.url, "--once", "--json", "--interval", "0.2")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["requests"]["ok"] >= 2
    assert 0 < seen["latency"]["p50"] <= seen["latency"]["p99"]
    assert 0 < seen["first_audio"]["p50"] <= seen["latency"]["p99"]
    assert set(seen["stages"]) == {"encode", "llm", "decode"}
    assert seen["llm"]["kv_slots_total"] > 0
    names = {process["name"] for process in seen["processes"]}
    assert {"front", "http", "supervisor", "janitor", "encode 0", "llm 0", "decode 0"} <= names
    assert seen["memory_mb"] > 50


def test_monitor_draws_a_page_for_a_person(server):
    done = run("scripts/monitor.py", "--url", server.url, "--once", "--interval", "0.2")
    assert done.returncode == 0, done.stderr
    for word in ("requests", "latency", "first audio", "KV slots", "supervisor"):
        assert word in done.stdout


def test_monitor_without_a_server_says_so():
    done = run("scripts/monitor.py", "--url", "http://127.0.0.1:1", "--once")
    assert done.returncode == 1
    assert "http://127.0.0.1:1" in done.stderr


# ---------------------------------------------------------------- log_stats


def test_log_stats_gives_the_quantiles_of_cost_time(tmp_path: Path):
    log = tmp_path / "light-tts.log"
    lines = [f"2026-01-01 00:00:00 INFO http[1] id{n} outcome=ok cost_time {n}ms\n" for n in range(1, 102)]
    log.write_text("".join(["a line without a time\n", *lines]))
    done = run("scripts/log_stats.py", str(log))
    assert " ".join(done.stdout.split()) == "count 101 mean 51.0 ms P50 51.0 ms P90 91.0 ms P99 100.0 ms"
    done = run("scripts/log_stats.py", str(log), "--last", "1")
    assert done.stdout.startswith("count 1\nmean  101.0 ms")


def test_log_stats_reads_what_the_server_writes(server):
    assert run("test/benchmark.py", "--url", server.url, "--number", "1", *SHORT).returncode == 0
    done = run("scripts/log_stats.py", str(server.directory / "logs" / "light-tts.log"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 1


def test_log_stats_counts_what_was_not_served_apart(tmp_path: Path):
    log = tmp_path / "light-tts.log"
    log.write_text(
        "x http[1] a route=zero_shot outcome=ok audio=1.00s ttfa=9ms cost_time 100ms\n"
        "x http[1] b route=zero_shot outcome=rejected audio=0.00s ttfa=-ms error='no' after 1ms\n"
        "x http[1] c route=health outcome=ok audio=1.00s ttfa=-ms after 700ms\n"
    )
    lines = run("scripts/log_stats.py", str(log)).stdout.splitlines()
    assert lines[0] == "count 1" and "mean  100.0 ms" in lines
    as_json = "".join(json.dumps({"message": line}) + "\n" for line in log.read_text().splitlines())
    log.write_text(as_json)
    assert run("scripts/log_stats.py", str(log)).stdout.splitlines() == lines
    assert lines[-1] == "not served: rejected 1"


def test_log_stats_says_when_there_is_nothing_to_count(tmp_path: Path):
    log = tmp_path / "empty.log"
    log.write_text("nothing here\n")
    done = run("scripts/log_stats.py", str(log))
    assert done.returncode == 1 and str(log) in done.stderr
