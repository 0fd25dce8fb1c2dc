"""`light-tts doctor`: first diagnosis when something is wrong with a server."""

from __future__ import annotations

import argparse
import re
from collections import deque
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from light_tts.cli import machine
from light_tts.cli.client import DEFAULT_URL, Client, Problem, add_server_arguments
from light_tts.cli.findings import Findings
from light_tts.common.log import FILE_NAME
from light_tts.server.core.rundir import PREFIX, SHARED_MEMORY, RunDir
from light_tts.server.core.settings import Settings

TROUBLES = re.compile(r'[ "](WARNING|ERROR|CRITICAL)[ "]')
LINES = 5
MANY_FAILURES = 0.02  # fraction of the requests
HEALTH_SECONDS = 70.0


def add_parser(commands: Any) -> None:
    defaults = Settings()
    parser = commands.add_parser(
        "doctor",
        help="diagnose the server on this machine",
        description="Check the state of a running server, its log, this machine, and files left by dead "
        "servers. Exit code 1 if something does not work.",
    )
    add_server_arguments(parser)
    parser.add_argument("--log_dir", type=Path, default=Path(defaults.log_dir), help="default: %(default)s")
    parser.add_argument("--spk_dir", type=Path, default=Path(defaults.spk_dir), help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    findings = Findings()
    _server(findings, Client(args.url or DEFAULT_URL, args.key))
    _log(findings, args.log_dir / FILE_NAME)
    machine.look(findings)
    machine.disk(findings, "log", args.log_dir)
    machine.disk(findings, "voices", args.spk_dir)
    _run_directories(findings)
    print()
    print(f"Not well: {', '.join(findings.bad)}." if findings.bad else "All is well.")
    return 1 if findings.bad else 0


def _server(findings: Findings, client: Client) -> None:
    findings.heading(f"Server {client.url}")
    try:
        client.http.get("/liveness", timeout=10).raise_for_status()
        ready = client.http.get("/readiness", timeout=10).json()
    except httpx.HTTPError as error:
        findings.fail("answers", f"{error}; is it running, and is this its --url?")
        return
    findings.ok("answers")
    if ready["draining"]:
        findings.note("draining", "it is shutting down; new requests get 503")
    for stage in ready["stages"]:
        name = f"{stage['stage']}-{stage['index']}"
        reason = f": {stage['reason']}" if stage["reason"] else ""
        findings.add("ok" if stage["state"] == "up" else "bad", name, f"{stage['state']}{reason}")
    _speaks(findings, client)
    try:
        _requests(findings, client.ask("GET", "/metrics").text)
    except Problem as problem:
        findings.note("metrics", str(problem))


def _speaks(findings: Findings, client: Client) -> None:
    try:
        health = client.http.get("/health", timeout=HEALTH_SECONDS)
        body = health.json()
    except (httpx.HTTPError, ValueError) as error:
        findings.fail("speaks", str(error))
        return
    findings.add("ok" if health.status_code == 200 else "bad", "speaks", body.get("message", ""))


def _requests(findings: Findings, text: str) -> None:
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("route") == "health":
                continue
            label = sample.labels.get("outcome") or sample.labels.get("stage") or ""
            sums[sample.name, label] = sums.get((sample.name, label), 0.0) + sample.value
    outcomes = {label: int(n) for (name, label), n in sums.items() if name == "light_tts_requests_total"}
    shown = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())) or "none yet"
    failed = sum(outcomes.get(outcome, 0) for outcome in ("failed", "timeout", "unavailable"))
    many = failed > MANY_FAILURES * sum(outcomes.values())
    findings.add("bad" if many else "ok", "requests", shown)
    count = sums.get(("light_tts_time_to_first_audio_seconds_count", ""), 0)
    if count:
        mean = sums["light_tts_time_to_first_audio_seconds_sum", ""] / count
        findings.ok("first audio", f"after {mean:.2f} s on average")
    restarts = {
        stage: int(n) for (name, stage), n in sums.items() if name == "light_tts_stage_restarts_total"
    }
    if any(restarts.values()):
        findings.note("restarts", ", ".join(f"{stage} {n} times" for stage, n in restarts.items() if n))


def _log(findings: Findings, path: Path) -> None:
    if not path.is_file():
        findings.note("log", f"{path} does not exist (--log_dir)")
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        last = deque((line.rstrip() for line in file if TROUBLES.search(line)), LINES)
    findings.add("note" if last else "ok", "log", "\n".join(last) or f"no warnings in {path}")


def _run_directories(findings: Findings) -> None:
    """Report the servers of this machine: running ones and files left by dead ones."""
    running: list[str] = []
    dead: list[str] = []
    for directory in sorted(SHARED_MEMORY.glob(f"{PREFIX}*")):
        run_dir = RunDir.of_shared_memory(directory, "")
        if run_dir is not None:
            (running if run_dir.processes() else dead).append(directory.name)
    findings.ok("servers", f"{len(running)} run here" + "".join(f"\n{name}" for name in running))
    if dead:
        findings.note("left by dead servers", "\n".join([*dead, "the next start removes them"]))
