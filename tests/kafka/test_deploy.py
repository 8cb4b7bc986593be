"""What users are given to run is what the tests run. Needs no Kafka."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_compose_runs_the_version_that_is_tested() -> None:
    compose = yaml.safe_load((ROOT / "cluster" / "deploy" / "compose.yaml").read_text())
    pom = ElementTree.parse(ROOT / "tests" / "kafka" / "pom.xml")
    version = pom.findtext("{*}properties/{*}kafka.version")
    assert version
    assert {service["image"] for service in compose["services"].values()} == {f"apache/kafka:{version}"}


def test_compose_listens_on_the_loopback_interface_only() -> None:
    compose = yaml.safe_load((ROOT / "cluster" / "deploy" / "compose.yaml").read_text())
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
