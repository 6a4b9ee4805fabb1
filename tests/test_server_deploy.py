"""Deployment files: they agree with the server's flags, its metrics, and with one another."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import ServeConfig
from server.metrics import Metrics

DEPLOY = Path(__file__).parent.parent / "deploy"


def command_lines() -> dict[str, list[str]]:
    """The arguments of `ard serve` in each file."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["ard-serve"]["command"]
    unit = next(line for line in (DEPLOY / "ard-serve.service").read_text().splitlines() if line.startswith("ExecStart"))
    return {"compose": compose, "kubernetes": container()["args"], "systemd": unit.split(" serve ")[1].split()}


def kubernetes() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "ard-serve.yaml").read_text())
    return {document["kind"]: document for document in documents}


def container() -> dict[str, Any]:
    return dict(kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"][0])


@pytest.mark.parametrize("name", ["compose", "kubernetes", "systemd"])
def test_every_flag_is_a_field_of_the_settings(name: str) -> None:
    model, *rest = command_lines()[name]
    pairs = {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(rest[::2], rest[1::2], strict=True)}
    config = ServeConfig.resolve(None, {"model": model, **pairs})
    assert config.api_keys


def test_everybody_waits_longer_than_the_drain() -> None:
    seconds = {name: int(line[line.index("--drain-s") + 1]) for name, line in command_lines().items()}
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["ard-serve"]
    assert int(compose["stop_grace_period"].removesuffix("s")) > seconds["compose"]
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    pre_stop_s = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > seconds["kubernetes"] + pre_stop_s
    unit = (DEPLOY / "ard-serve.service").read_text()
    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > seconds["systemd"]


def test_probes_use_our_routes_and_scaling_our_metric() -> None:
    assert container()["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container()["livenessProbe"]["httpGet"]["path"] == "/livez"
    (metric,) = kubernetes()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in our_metrics()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    panels = json.loads((DEPLOY / "grafana" / "ard-serve.json").read_text())["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in re.findall(r"\bard_\w+", target["expr"])}
    assert len(asked) > 8
    assert asked <= our_metrics()


def our_metrics() -> set[str]:
    names = {family.name for family in Metrics().registry.collect()}
    return names | {name + suffix for name in names for suffix in ("_total", "_bucket")}


def test_the_manifests_are_valid_kubernetes() -> None:
    tool = Path(sys.executable).with_name("kubernetes-validate")
    subprocess.run([str(tool), "--strict", str(DEPLOY / "kubernetes" / "ard-serve.yaml")], check=True)


def test_compose_reads_its_file_and_asks_for_the_model() -> None:
    tool = next(filter(_runs, (["docker-compose"], ["docker", "compose"])), None)
    if tool is None:
        pytest.skip("needs docker-compose or docker's compose plugin (a daemon is not needed)")
    command = [*tool, "-f", str(DEPLOY / "compose.yaml"), "config"]
    environment = {name: value for name, value in os.environ.items() if name != "MODEL"}
    without = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "folder of the exported model" in without.stderr
    done = subprocess.run(command, env=environment | {"MODEL": "/models/restored"}, capture_output=True, text=True, check=True)
    service = yaml.safe_load(done.stdout)["services"]["ard-serve"]
    assert service["command"] == command_lines()["compose"]
    assert "/models/restored" in str(service["volumes"])
    assert service["read_only"] is True


def _runs(tool: list[str]) -> bool:
    """Docker itself may be there without its plugin."""
    return bool(shutil.which(tool[0])) and subprocess.run([*tool, "version"], capture_output=True, check=False).returncode == 0


def test_systemd_finds_nothing_wrong_but_that_it_is_not_installed() -> None:
    tool = shutil.which("systemd-analyze")
    if not tool:
        pytest.skip("needs systemd-analyze")
    done = subprocess.run([tool, "verify", str(DEPLOY / "ard-serve.service")], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "/opt/ard-serve/bin/ard is not executable" not in line] == []


def test_the_documented_key_file_is_one() -> None:
    from server.auth import KeyFile

    text = (DEPLOY.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert KeyFile.model_validate(tomllib.loads(example)).keys
