# SPDX-License-Identifier: BSD-3-Clause
"""`migroce setup docker` and its undoing, with real daemons that had no such runtime before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.stage import wait_for

from migroce import dockersetup, doctor
from migroce.dockersetup import Layout
from migroce.errors import MigroceError
from migroce.lab.api import Lab


def runtimes() -> list[str]:
    info = dockersetup.docker_info()
    return sorted(info["Runtimes"]) if info else []


def test_set_up_and_undone(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = lab.node("a")
    assert lab.docker is not None
    for name, value in lab.docker.environment({"DOCKER_HOST": node.context.docker_host or ""}).items():
        monkeypatch.setenv(name, value)
    config = node.context.state / "daemon.json"
    own = json.loads(config.read_text())
    users = {**own, "runtimes": {"mine": {"path": "/usr/sbin/runc"}}}
    layout = Layout(tmp_path, config)
    try:
        config.write_text(json.dumps(users))
        dockersetup._reload(layout, dockersetup.Outcome())
        wait_for("a Docker without the runtime", lambda: "migroce" not in runtimes())
        assert doctor._docker().mend == "migroce setup docker"

        outcome = dockersetup.apply(layout, default=True)
        assert outcome.docker is not None
        assert any("runtimes.migroce = " in line for line in outcome.changes)
        assert outcome.todo == []
        wait_for("the runtime", lambda: {"migroce", "migroce-asked"} <= set(runtimes()))
        assert doctor._docker().state is doctor.State.GOOD
        assert dockersetup.apply(layout, default=True).changes == []  # once more: nothing to do
        merged = json.loads(config.read_text())
        assert merged.pop("default-runtime") == "migroce-asked"
        assert sorted(merged.pop("runtimes")) == ["migroce", "migroce-asked", "mine"]
        assert merged == {key: value for key, value in users.items() if key != "runtimes"}

        def devices(*options: str) -> str:
            argv = ["docker", "run", "--rm", *options, "docker-repo/perftest", "ibv_devices"]
            return node.run(argv, check=False, timeout=60).stdout.decode()

        assert "rxe0" in devices("--runtime", "migroce")
        assert "rxe0" not in devices()
        assert "rxe0" in devices("-e", "MIGROCE=on")
        if not outcome.docker.startswith("20."):
            assert "rxe0" in devices("--device", "migroce/rdma=rxe0")

        user = ["--runtime", "migroce", "--name", "user", "docker-repo/perftest", "true"]
        node.run(["docker", "create", *user])
        with pytest.raises(MigroceError, match="containers use the runtime: user"):
            dockersetup.undo(layout)
        node.run(["docker", "rm", "user"])
        dockersetup.undo(layout)
        wait_for("a Docker without the runtime", lambda: "migroce" not in runtimes())
        assert json.loads(config.read_text()) == users
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    finally:
        config.write_text(json.dumps({"default-runtime": "runc", **own}))
        dockersetup._reload(layout, dockersetup.Outcome())
        wait_for("the lab's own configuration", lambda: "migroce" in runtimes())
