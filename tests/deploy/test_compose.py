"""Container files, by what they say: paths that exist, settings that are known, services that find one another."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from app.http.server import _ANSWERING
from app.log import ENDING
from app.settings import Settings, variable, variables

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def mounts(service: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(source, target, mode); where the source is a variable, its default."""
    found = []
    for volume in service.get("volumes", []):
        source, target, *mode = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")
        found.append((source, target, mode[0] if mode else "rw"))
    return found


def settings() -> set[str]:
    return {name for field in Settings.model_fields for name in variables(field)}


@pytest.mark.parametrize("name", SERVICES)
def test_every_mount_is_there(name: str) -> None:
    for source, target, mode in mounts(SERVICES[name]):
        assert target.startswith("/")
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert mode == "ro", f"{source} is the repository's"
        else:
            assert source in COMPOSE["volumes"], source


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_open_to_the_network(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@pytest.mark.parametrize("name", OURS)
def test_our_containers_can_do_little(name: str) -> None:
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert "no-new-privileges:true" in service["security_opt"]
    ours = {variable for variable in service.get("environment", {}) if variable.startswith(("WAVESPEED_", "LD_"))}
    assert ours <= settings()


@pytest.mark.parametrize("name", ["wavespeed", "wavespeed-gpu"])
def test_the_service_has_time_to_end_and_folders_that_it_may_write(name: str) -> None:
    service = SERVICES[name]
    least = Settings.model_fields["drain_seconds"].default + Settings.model_fields["stop_seconds"].default
    least += _ANSWERING + 2 * ENDING
    assert int(service["stop_grace_period"].removesuffix("s")) > least
    targets = {target: mode for _, target, mode in mounts(service)}
    made = re.search(r"mkdir --parents (.*?) &&", DOCKERFILE)
    assert made is not None
    assert set(targets) == set(made[1].split()), "a volume's owner is that of the folder it is laid over"
    for kind in ("JOBS", "CHECKPOINT", "LORA", "EMBEDDING", "UPSCALER"):
        folder = f"WAVESPEED_{kind}_FOLDER"
        path = PurePosixPath(service["environment"][folder])
        [mode] = [mode for target, mode in targets.items() if path.is_relative_to(target)]
        assert mode == ("rw" if folder == "WAVESPEED_JOBS_FOLDER" else "ro")


@pytest.mark.parametrize("name", ["wavespeed", "wavespeed-gpu"])
def test_every_setting_is_passed_on(name: str) -> None:
    """But those that the image fixes: where it listens, and the folder of the log's volume."""
    passed = set(SERVICES[name]["environment"])
    assert {variable(field) for field in Settings.model_fields if field not in ("host", "port", "log_folder")} <= passed


@pytest.mark.parametrize("name", ["wavespeed", "wavespeed-gpu"])
def test_a_model_of_the_hub_can_be_fetched_and_kept(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert environment["HF_HUB_OFFLINE"] == "${HF_HUB_OFFLINE:-1}"
    assert environment["HF_TOKEN"] is None  # from the shell
    (cache,) = re.findall(r"HF_HOME=(\S+)", DOCKERFILE)
    assert {target: mode for _, target, mode in mounts(SERVICES[name])}[cache] == "rw"


def test_prometheus_and_grafana_find_what_they_look_for() -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    [target] = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in SERVICES
    assert host in SERVICES["wavespeed-gpu"]["networks"]["default"]["aliases"]
    assert f"WAVESPEED_PORT={port}" in DOCKERFILE

    grafana = ROOT / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((grafana / "datasources/prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(published.endswith(f":{port}") for published in SERVICES[host]["ports"])
    [provider] = yaml.safe_load((grafana / "dashboards/wavespeed.yml").read_text(encoding="utf-8"))["providers"]
    mounted = {target: ROOT / source for source, target, _ in mounts(SERVICES["grafana"])}
    home = PurePosixPath(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounted[provider["options"]["path"]] / home.name).is_file()
    assert str(home.parent) == provider["options"]["path"]
    assert mounted["/etc/grafana/provisioning"] == grafana


def test_the_image_is_made_from_what_the_build_context_holds() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    ignored = [line for line in lines if line and not line.startswith("#")]
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    sources = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {source for line in sources for source in line.split()}
    assert copied == let_in
    assert "*" in ignored
    assert any(fnmatch.fnmatch("app/__pycache__", line) for line in ignored)


def test_the_image_runs_as_a_user_without_a_name_to_look_up() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    assert re.findall(r"^USER (.*)$", stages[-1], re.MULTILINE) == ["10001:10001"]
    variables = set(re.findall(r"\b((?:WAVESPEED|LD)_\w+)=", stages[-1]))
    assert variables <= settings()
