# SPDX-License-Identifier: BSD-3-Clause
"""`migroce doctor`: every check finds something out, says the mend, and never raises."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from migroce import criu, criucheck, doctor
from migroce.doctor import State

from .conftest import Migroce


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_what_is_not_good_comes_with_a_mend() -> None:
    for check in doctor.examine(real=False):
        assert check.text
        assert check.state is State.GOOD or check.mend or "cannot be" in check.text


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Check:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(doctor, "_nft", broken)
    found = by_name(doctor.examine(real=False))
    assert found["broken"].state is State.WARN
    assert "no such luck" in found["broken"].text


def test_missing_tools_are_named_with_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.criu, "environment", lambda: {"PATH": str(tmp_path)})
    found = by_name(doctor.examine(real=False))
    assert found["OCI runtime"].state is State.BAD
    assert "runc" in found["OCI runtime"].mend
    assert found["nftables"].state is State.BAD
    assert "iproute2" in found["tools"].mend


def test_an_old_criu_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "criu"
    old.write_text("#!/bin/sh\necho 'Version: 3.17.1'\n")
    old.chmod(0o755)
    assert criucheck.version(old) == (3, 17, 1)
    if os.geteuid() == 0:
        with pytest.raises(criucheck.CriuError, match=r"at least 4\.2"):
            criucheck.verify(old)


def test_a_criu_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(criucheck.CriuError, match="cannot be run"):
        criucheck.version(tmp_path / "nothing")


@pytest.mark.root
def test_a_criu_that_only_claims_to_work_is_found_out(tmp_path: Path) -> None:
    liar = tmp_path / "criu"
    liar.write_text("#!/bin/sh\ncase $1 in --version) echo 'Version: 9.9' ;; *) exit 1 ;; esac\n")
    liar.chmod(0o755)
    with pytest.raises(criucheck.CriuError, match="dump failed"):
        criucheck.verify(liar)


@pytest.mark.root
def test_the_criu_of_this_tree_dumps_and_restores() -> None:
    found = criu.find()
    assert found is not None
    assert criucheck.verify(found) > 0


@pytest.mark.root
def test_the_exit_status_tells_whether_something_is_lacking(migroce: Migroce) -> None:
    good = migroce("doctor", "--json")
    checks = json.loads(good.stdout)
    assert (good.returncode == 0) == checks["ok"]
    lacking = migroce("doctor", "--json", MIGROCE_CRIU="/nonexistent/criu")
    assert lacking.returncode == 1
    bad = [check for check in json.loads(lacking.stdout)["checks"] if check["state"] == "bad"]
    assert [check["name"] for check in bad] == ["CRIU"]
    assert "/nonexistent/criu" in bad[0]["text"]
