"""A Ray cluster of this machine alone, to which `serve deploy` sends config/ray_serve.yaml."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from light_tts.scale.ray_serve import ONE_PROXY, RETRY
from support.replicas import wait_for_servers
from support.server_process import ROOT, Server, free_port

FILE = ROOT / "config" / "ray_serve.yaml"
SECONDS = 280.0
STOP_SECONDS = 120.0  # a busy machine
WITHOUT_TOKENS = {**os.environ, "RAY_AUTH_MODE": "disabled"}


class Cluster:
    """`server`: what it serves, for what asks a server; its process is that of `ray start`."""

    def __init__(self, directory: Path, process: subprocess.Popen, dashboard: str) -> None:
        self.server = Server(free_port(), directory, process)
        self.dashboard = dashboard

    def file(self, **deployment: Any) -> dict[str, Any]:
        """The repository's file for this machine: no GPU, loopback, and these options of the deployment."""
        config = copy.deepcopy(yaml.safe_load(FILE.read_text("utf-8")))
        config["http_options"] = {"host": "127.0.0.1", "port": self.server.port}
        [application] = config["applications"]
        flags = application["args"]["flags"].replace("/srv/light-tts", str(self.server.directory))
        flags += " --log_dir logs"
        application["args"] |= {"gpus": 0, "cpus": 1, "directory": str(self.server.directory), "flags": flags}
        application["deployments"][0] |= deployment
        return config

    def deploy(self, config: dict[str, Any], *more_flags: str) -> None:
        """`serve deploy`; returns once the cluster has taken it."""
        config["applications"][0]["args"]["flags"] += "".join(f" {flag}" for flag in more_flags)
        path = self.server.directory / "serve.yaml"
        path.write_text(yaml.safe_dump(config), "utf-8")
        command = [_command("serve"), "deploy", "--address", self.dashboard, str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS, env=WITHOUT_TOKENS)

    def status(self) -> tuple[str, int]:
        """Return the application's status as Serve reports it, and the number of running replicas."""
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=30).raise_for_status().json()
        application = answer["applications"].get("light-tts", {})
        found = [item for one in application.get("deployments", {}).values() for item in one["replicas"]]
        return application.get("status", ""), sum(item["state"] == "RUNNING" for item in found)

    def wait_for(self, replicas: int) -> None:
        """Wait until so many replicas serve, the proxy knows them, and nothing is about to change."""
        end = time.monotonic() + SECONDS
        while (found := self.status()) != ("RUNNING", replicas):
            if time.monotonic() > end:
                raise TimeoutError(f"not {replicas} replicas, but {found}")
            time.sleep(0.5)
        wait_for_servers(self.server, replicas)


@contextlib.contextmanager
def start_cluster() -> Iterator[Cluster]:
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port")
    ports = {name: free_port() for name in names}
    environment = {
        **WITHOUT_TOKENS,
        "OMP_NUM_THREADS": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing speaks any more at the end
        **ONE_PROXY,
        **RETRY,
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    }
    with tempfile.TemporaryDirectory(prefix="ltts-") as name:
        command = [_command("ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--num-cpus=8", "--include-dashboard=true", "--node-ip-address=127.0.0.1"]
        command += ["--object-store-memory=100000000"]  # bytes; replicas keep nothing in it
        command += [f"--temp-dir={name}/ray"]
        command += [f"--{flag}={port}" for flag, port in ports.items()]
        with open(f"{name}/output.log", "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        cluster = Cluster(Path(name), process, f"http://127.0.0.1:{ports['dashboard-port']}")
        try:
            _wait_for_the_dashboard(cluster)
            yield cluster
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_SECONDS)


def _wait_for_the_dashboard(cluster: Cluster) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if cluster.server.process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            cluster.status()
            return
        time.sleep(0.5)
    raise RuntimeError(f"the cluster has not started:\n{cluster.server.output}")


def _command(name: str) -> str:
    return str(Path(sys.executable).parent / name)
