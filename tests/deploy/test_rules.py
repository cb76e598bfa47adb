"""Prometheus' configuration, rules and alerts, as promtool judges them, and what they say of this service."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import ServiceError

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules(name: str) -> list[dict[str, Any]]:
    document = yaml.safe_load((PROMETHEUS / "rules" / name).read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


@needs_promtool
def test_the_configuration_and_its_rules_are_valid() -> None:
    said = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert re.findall(r"(\d+) rules found", said) == [str(len(rules(name))) for name in ("alerts.yml", "recording.yml")]


@needs_promtool
def test_rules_give_what_was_reckoned_by_hand() -> None:
    promtool("test", "rules", Path(__file__).parent / "rules.test.yml")


def test_every_rule_is_tested() -> None:
    tested = (Path(__file__).parent / "rules.test.yml").read_text(encoding="utf-8")
    for rule in (*rules("alerts.yml"), *rules("recording.yml")):
        assert rule.get("alert", rule.get("record")) in tested


def kinds(error: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield error
    for narrower in error.__subclasses__():
        yield from kinds(narrower)


def test_the_servers_errors_are_those_of_status_500_and_more() -> None:
    [ratio] = [rule["expr"] for rule in rules("recording.yml") if "request_errors" in rule["record"]]
    named = re.search(r'outcome=~"([a-z_|]+)"', ratio)
    assert named is not None
    assert named[1].split("|") == sorted({kind.type for kind in kinds(ServiceError) if kind.status >= 500})
