# SPDX-License-Identifier: BSD-3-Clause
"""What users may ask of a lab and cannot have: a sentence, and nothing is made."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from migroce.cli.app import app
from migroce.errors import LabError
from migroce.lab import api, docker


@pytest.mark.root
@pytest.mark.parametrize(
    ("subnet", "why"),
    [
        ("nonsense", "is no IPv4 network"),
        ("10.0.1.5/24", "is no IPv4 network"),
        ("fd00::/64", "is no IPv4 network"),
        ("10.0.1.0/30", "is too small"),
        ("0.0.0.0/0", "no container can have"),
        ("127.0.0.0/8", "no container can have"),
        ("224.0.0.0/24", "no container can have"),
        ("255.255.255.0/24", "no container can have"),
        ("192.168.0.0/16", "overlaps the nodes' own network"),
    ],
)
def test_a_network_that_a_lab_cannot_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subnet: str, why: str
) -> None:
    monkeypatch.setenv("MIGROCE_RUN_DIR", str(tmp_path))
    with pytest.raises(LabError, match=why):
        api.Lab.up("no-such", subnet=subnet)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".no-such.lock"] == []


@pytest.mark.parametrize(
    ("ip", "why"),
    [
        ("999.1.1.1", "is no IPv4 address"),
        ("", "is no IPv4 address"),
        ("10.9.9.9", "is not in the lab's network"),
        ("10.0.1.0", "means all of"),
        ("10.0.1.255", "means all of"),
    ],
)
def test_an_address_that_no_container_can_have(ip: str, why: str) -> None:
    with pytest.raises(LabError, match=why):
        api._check_address(ip, ipaddress.IPv4Network("10.0.1.0/24"))


@pytest.mark.parametrize("release", ["19.03", "26", "newest"])
def test_a_docker_that_there_is_not(release: str) -> None:
    with pytest.raises(LabError, match=f"no Docker '{release}'; name 20.10, 26.1 or system"):
        docker.find(release)


@pytest.mark.parametrize(("env", "why"), [("FOO", "FOO has no value"), ("=x", "=x has no name")])
def test_an_environment_that_is_none(env: str, why: str) -> None:
    done = CliRunner().invoke(app, ["lab", "run", "node-a", "c", "-e", env, "--", "true"])
    assert why in str(done.exception)


@pytest.mark.root
def test_taking_down_a_lab_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGROCE_RUN_DIR", str(tmp_path / "run"))
    done = CliRunner().invoke(app, ["lab", "down", "--lab", "no-such"])
    assert done.exit_code == 0
    assert done.output == "there is no lab no-such\n"
    assert list(tmp_path.iterdir()) == []
