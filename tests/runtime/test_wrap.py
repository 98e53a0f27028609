# SPDX-License-Identifier: BSD-3-Clause
"""migroce-runtime as an engine calls it, before a runtime that writes down how it was called."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migroce import launch
from migroce.agent.client import AgentClient
from migroce.runtime import launcher

_RUNC = '#!/bin/sh\nfor word; do echo "$word"; done >"$CALLED"\nexit ${STATUS:-0}\n'


class Engine:
    """An engine: a bundle, and calls of the runtime."""

    def __init__(self, tmp: Path, run_dir: Path) -> None:
        self.tmp = tmp
        self.bundle = tmp / "bundle"
        (self.bundle / "rootfs").mkdir(parents=True)
        self.configure()
        self.runtime = launcher.write(tmp / launcher.NAME)
        self.asked = launcher.write(tmp / "asked", asked=True)
        (tmp / "runc").write_text(_RUNC)
        (tmp / "runc").chmod(0o755)
        self.env = {
            "PATH": os.environ["PATH"], "MIGROCE_RUNC": str(tmp / "runc"), "CALLED": str(tmp / "called"),
            "MIGROCE_RUN_DIR": str(run_dir), "MIGROCE_CRIU": "/bin/true",
        }  # fmt: skip

    def configure(self, **more: Any) -> None:
        config = {"process": {"args": ["true"], "env": ["PATH=/bin"]}, "root": {"path": "rootfs"}, **more}
        (self.bundle / "config.json").write_text(json.dumps(config))

    def config(self) -> str:
        return (self.bundle / "config.json").read_text()

    def call(self, *words: str, runtime: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        (self.tmp / "called").unlink(missing_ok=True)
        (self.tmp / "log.json").unlink(missing_ok=True)
        options = ["--root", str(self.tmp / "root"), "--log", str(self.tmp / "log.json")]
        argv = [str(runtime or self.runtime), *options, "--log-format", "json", *words]
        return subprocess.run(argv, env={**self.env, **env}, capture_output=True, text=True, check=False)

    def freezer(self) -> Path:
        """The state of the container's freezer, for which a file stands: nothing runs in it."""
        group = self.tmp / "cgroup"
        group.mkdir()
        (group / "cgroup.procs").touch()
        (group / "freezer.state").write_text("THAWED")
        state = self.tmp / "root/box/state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"cgroup_paths": {"freezer": str(group)}}))
        return group / "freezer.state"

    def known(self, kind: str) -> Path:
        """A file by which the runtime knows of the container."""
        return Path(self.env["MIGROCE_RUN_DIR"]) / f"runtime/box.{kind}"

    def called(self) -> list[str] | None:
        """What the real runtime was called with, without the global options; None: it was not."""
        try:
            return (self.tmp / "called").read_text().splitlines()[6:]
        except FileNotFoundError:
            return None

    def create(self, runtime: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return self.call("create", "--bundle", str(self.bundle), "box", runtime=runtime, **env)


@pytest.fixture
def engine(tmp_path: Path, short_dir: Path) -> Engine:
    return Engine(tmp_path, short_dir)


@pytest.fixture
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("r")
    path.chmod(0o700)
    return path


@pytest.fixture
def agent(short_dir: Path) -> Iterator[AgentClient]:
    launch.ensure_agent(short_dir)
    with AgentClient(short_dir / "admin.sock") as client:
        yield client
        client.shutdown()


def known(agent: AgentClient) -> list[str]:
    return [each["id"] for each in agent.status()["containers"] if not each["implicit"]]


@pytest.mark.parametrize("words", [["state", "box"], ["kill", "--all", "box", "9"], ["--version"], []])
def test_what_is_not_ours_becomes_runc_with_the_same_words(engine: Engine, words: list[str]) -> None:
    assert engine.call(*words, STATUS="7").returncode == 7
    assert engine.called() == words


def test_a_container_has_the_device_and_is_forgotten_with_its_end(engine: Engine, agent: AgentClient) -> None:
    assert engine.create().returncode == 0
    assert engine.called() == ["create", "--bundle", str(engine.bundle), "box"]
    assert "LD_PRELOAD=/usr/lib/migroce/libmigroce.so" in engine.config()
    assert known(agent) == ["box"]
    assert engine.call("delete", "--force", "box").returncode == 0
    assert engine.called() == ["delete", "--force", "box"]
    assert known(agent) == []


def test_a_container_that_could_not_be_created_is_forgotten(engine: Engine, agent: AgentClient) -> None:
    assert engine.create(STATUS="1").returncode == 1
    assert known(agent) == []


@pytest.mark.parametrize(
    ("more", "always", "asked"),
    [
        ({}, True, False),
        ({"annotations": {"migroce": "on"}}, True, True),
        ({"annotations": {"migroce": "off"}}, False, False),
        ({"process": {"args": ["true"], "env": ["MIGROCE=on"]}}, True, True),
        ({"process": {"args": ["true"], "env": ["MIGROCE=off"]}}, False, False),
    ],
)
def test_who_gets_the_device(
    engine: Engine, agent: AgentClient, more: dict[str, Any], always: bool, asked: bool
) -> None:
    for runtime, wanted in ((engine.runtime, always), (engine.asked, asked)):
        engine.configure(**more)
        before = engine.config()
        assert engine.create(runtime).returncode == 0
        assert engine.called() == ["create", "--bundle", str(engine.bundle), "box"]
        assert (engine.config() != before) == wanted
        engine.call("delete", "box")
    assert known(agent) == []


def test_without_an_agent_nothing_is_created_and_the_engine_is_told_why(engine: Engine) -> None:
    before = engine.config()
    done = engine.create()
    assert done.returncode == 1
    assert engine.called() is None
    assert engine.config() == before
    entry = json.loads((engine.tmp / "log.json").read_text())
    assert entry["level"] == "error"
    assert "no agent at" in entry["msg"]
    assert "systemctl start migroce-agent" in entry["msg"]
    assert done.stderr.strip() == entry["msg"]


def test_links_in_an_image_lead_nowhere(engine: Engine, agent: AgentClient) -> None:
    elsewhere = engine.tmp / "elsewhere"
    elsewhere.mkdir()
    (engine.bundle / "rootfs/usr/lib").mkdir(parents=True)
    (engine.bundle / "rootfs/usr/lib/migroce").symlink_to(elsewhere)
    done = engine.create()
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert list(elsewhere.iterdir()) == []
    assert known(agent) == []


def test_a_container_that_is_not_ours_is_checkpointed_as_it_was_asked(engine: Engine) -> None:
    words = ["checkpoint", "--image-path", "/i", "other"]
    assert engine.call(*words).returncode == 0
    assert engine.called() == words
    assert engine.call("restore", "--image-path", "/i", "--bundle", "/b", "other").returncode == 0
    assert engine.called() == ["restore", "--image-path", "/i", "--bundle", "/b", "other"]


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("device", [True, False])
@pytest.mark.parametrize(("name", "stays"), [("ctrd-checkpoint123", False), ("ckpt1", True)])
def test_what_containerd_unpacked_for_a_restore_does_not_stay_in_tmp(
    engine: Engine, agent: AgentClient, name: str, stays: bool, device: bool, status: int
) -> None:
    words = restore(engine, name, device)
    assert engine.call(*words, STATUS=str(status)).returncode == status
    assert engine.called() is not None
    assert (engine.tmp / name).exists() == stays
    assert known(agent) == (["box"] if device and not status else [])


def test_nor_does_it_if_the_restore_does_not_begin(engine: Engine) -> None:
    words = restore(engine, "ctrd-checkpoint123", device=True)
    done = engine.call(*words)
    assert (done.returncode, engine.called()) == (1, None)
    assert "no agent at" in done.stderr
    assert not (engine.tmp / "ctrd-checkpoint123").exists()


def restore(engine: Engine, name: str, device: bool) -> list[str]:
    """The words of a restore from a directory of that name, which is made."""
    images = engine.tmp / name
    images.mkdir()
    (images / "pages-1.img").touch()
    if device:
        (images / "migroce").mkdir()
        (images / "migroce/checkpoint.json").write_text('{"version": 1, "contexts": 0}')
    return ["restore", "--detach", "--image-path", str(images), "--bundle", str(engine.bundle), "box"]


@pytest.mark.root
@pytest.mark.usefixtures("agent")
def test_a_network_is_quiet_before_the_engine_puts_an_interface_into_it(engine: Engine) -> None:
    engines = {"path": "/usr/bin/dockerd", "args": ["libnetwork-setkey"]}
    namespaces = [{"type": "network"}]
    engine.configure(hooks={"prestart": [engines]}, linux={"namespaces": namespaces})
    assert engine.call(*restore(engine, "ckpt1", device=True)).returncode == 0
    first, second = json.loads(engine.config())["hooks"]["prestart"]
    assert second == engines
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        assert made.stdin is not None
        assert made.stdout is not None
        made.stdin.write(b"x")
        made.stdin.flush()
        assert made.stdout.read(1) == b"x"  # it is in its namespace
        told = json.dumps({"ociVersion": "1.0.2", "id": "box", "pid": made.pid, "bundle": "/b"}).encode()
        argv = [first["path"], *first["args"][1:]]
        subprocess.run(argv, env=dict(each.split("=", 1) for each in first["env"]), input=told, check=True)
        look = ["nsenter", f"--net=/proc/{made.pid}/ns/net", "nft", "list", "ruleset"]
        rules = subprocess.run(look, capture_output=True, text=True, check=True).stdout
        made.stdin.close()
    assert rules.count("policy drop") == 2
    assert rules.count("udp dport 4791 accept") == 2


@pytest.mark.usefixtures("agent")
def test_a_paused_container_is_stopped_and_frozen_until_it_is_resumed(engine: Engine) -> None:
    freezer, paused = engine.freezer(), engine.known("paused")
    engine.create()
    assert engine.call("pause", "box").returncode == 0
    assert (freezer.read_text(), engine.called()) == ("FROZEN", None)
    assert json.loads((paused / "checkpoint.json").read_text()) == {"version": 1, "contexts": 0, "qps": 0}
    assert engine.call("pause", "box", STATUS="5").returncode == 5  # runc says that it is paused already
    assert engine.call("resume", "box").returncode == 0
    assert engine.called() == ["resume", "box"]
    assert not paused.exists()


def test_contexts_that_cannot_be_stopped_are_frozen_as_they_are(engine: Engine) -> None:
    freezer, paused = engine.freezer(), engine.known("paused")
    paused.parent.mkdir()
    engine.known("json").write_text(json.dumps({"bundle": str(engine.bundle)}))
    assert engine.call("pause", "box").returncode == 0
    assert freezer.read_text() == "FROZEN"
    assert not paused.exists()


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("before", ["running", "paused"])
@pytest.mark.parametrize("leave", [False, True])
def test_a_checkpoint_has_the_dumps_beside_the_images(engine: Engine, before: str, leave: bool) -> None:
    freezer, images = engine.freezer(), engine.tmp / "images"
    engine.create()
    if before == "paused":
        engine.call("pause", "box")
    flags = ["--leave-running"] if leave else []
    assert engine.call("checkpoint", *flags, "--image-path", str(images), "box").returncode == 0
    assert "--tcp-established" in (engine.called() or [])
    assert (images / "migroce/checkpoint.json").is_file()
    assert freezer.read_text() == ("THAWED" if leave else "FROZEN")
    assert not engine.known("paused").exists()
    assert not engine.known("criu").exists()


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("before", ["running", "paused"])
@pytest.mark.parametrize("failing", ["runc", "dumps"])
def test_after_a_failed_checkpoint_the_container_runs_and_nothing_is_left(
    engine: Engine, before: str, failing: str
) -> None:
    freezer = engine.freezer()
    engine.create()
    if before == "paused":
        engine.call("pause", "box")
    images = engine.tmp / "images" if failing == "runc" else Path("/proc")  # where no directory can be made
    done = engine.call("checkpoint", "--image-path", str(images), "box", STATUS="3")
    assert done.returncode == (3 if failing == "runc" else 1)
    assert (engine.called() is None) == (failing == "dumps")
    assert freezer.read_text() == "THAWED"
    assert not (images / "migroce").exists()
    assert not engine.known("paused").exists()
    assert not engine.known("criu").exists()
    assert engine.call("resume", "box", STATUS="5").returncode == 0  # containerd paused it: no error
    assert engine.called() is None
