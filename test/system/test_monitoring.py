"""The files of config/monitoring against a running server: Prometheus scrapes it, the alerts are correct, and
every dashboard panel has data under load. Skipped without Prometheus (apt-get install prometheus)."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from support.server_process import ROOT, free_port, speak

FILES = ROOT / "config" / "monitoring"
WINDOW = "20s"
LONGEST_LOAD = 60.0  # seconds, until every query has data

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no Prometheus: apt-get install prometheus"
)


def queries() -> list[str]:
    dashboard = json.loads((FILES / "grafana-dashboard.json").read_text("utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes `target` every second, with the alerts of the repository."""
    config = yaml.safe_load((FILES / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FILES / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
    ]
    with open(folder / "prometheus.log", "wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def load(server) -> Iterator[None]:
    """In the meantime, three clients send requests of several kinds, some of them invalid."""
    over = threading.Event()

    def client_of(number: int) -> None:
        with server.client() as client:
            while not over.is_set():
                assert speak(client, "Good morning.", stream=number % 2 == 0).status_code == 200
                assert speak(client, "...").status_code == 400

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client_of, number) for number in range(3)]
        try:
            yield
        finally:
            over.set()
        for client in clients:
            client.result()


def values(client: httpx.Client, query: str) -> list[float]:
    try:
        answer = client.get("/api/v1/query", params={"query": query}).json()
    except httpx.ConnectError:  # it has just been started
        return []
    assert answer["status"] == "success", (query, answer)
    return [float(sample["value"][1]) for sample in answer["data"]["result"]]


def test_every_query_of_the_dashboard_has_data(server, tmp_path):
    empty = [query.replace("$__rate_interval", WINDOW).replace("$instance", ".*") for query in queries()]
    assert len(empty) > 20
    end = time.monotonic() + LONGEST_LOAD
    with prometheus(tmp_path, f"127.0.0.1:{server.port}") as client:
        with load(server):
            while empty and time.monotonic() < end:
                time.sleep(1)
                empty = [query for query in empty if all(map(math.isnan, values(client, query)))]
        assert empty == []
        assert values(client, 'up{job="light-tts"}') == [1]
        rules = client.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_the_alerts_fire_when_they_should():
    for what in ("config prometheus.yml", "rules alerts.yml"):
        subprocess.run(["promtool", "check", *what.split()], cwd=FILES, check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"], cwd=FILES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_name_only_metrics_that_are_documented():
    documented = set(re.findall(r"`(light_tts_\w+)`", (ROOT / "docs" / "metrics.md").read_text("utf-8")))
    text = "\n".join([*queries(), (FILES / "alerts.yml").read_text("utf-8")])
    for name in set(re.findall(r"light_tts_\w+", text)):
        assert name in documented or re.sub("_(bucket|sum|count)$", "", name) in documented, name
