# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints in directories: taken, looked at, restored, damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.stage import Check, Stage

from migroce.errors import MigrationError
from migroce.migration.api import checkpoint, read_manifest, restore, verify_manifest


def test_a_container_is_checkpointed_and_restored_on_the_other_node(stage: Stage, tmp_path: Path) -> None:
    check = Check(stage)
    check.more()
    directory = tmp_path / "ckpt"
    report = checkpoint(check.server.node, check.server.name, directory)
    assert (report.contexts, report.qps) == (1, 4)
    assert check.server.info()["status"] == "checkpointed"
    assert check.server.where() == []
    manifest = read_manifest(directory)
    assert (manifest.container, manifest.qps) == (check.server.name, 4)
    verify_manifest(directory, manifest)
    restore(stage.lab.node("b"), directory)
    check.server.home = "node-b"
    assert check.server.where() == ["node-b"]
    assert stage.lab.node("a").call("list") == []
    check.more()
    check.finish()


def test_a_container_is_restored_where_it_was_checkpointed(stage: Stage, tmp_path: Path) -> None:
    check = Check(stage)
    check.more()
    checkpoint(check.client.node, check.client.name, tmp_path / "ckpt")
    restore(check.client.node, tmp_path / "ckpt")
    assert check.client.where() == [check.client.home]
    check.more()
    check.finish()


def test_a_container_left_running_runs_on_after_its_checkpoint(stage: Stage, tmp_path: Path) -> None:
    check = Check(stage)
    check.more()
    report = checkpoint(check.server.node, check.server.name, tmp_path / "ckpt", leave_running=True)
    assert report.blackout > 0
    assert check.server.where() == ["node-a"]
    check.more()
    check.server.move()
    check.more()
    check.finish()


def test_a_failing_checkpoint_leaves_the_container_running_and_no_directory(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(stage)
    check.more()
    monkeypatch.setenv("MIGROCE_FAULT", "transfer.end")
    with pytest.raises(MigrationError) as caught:
        checkpoint(check.server.node, check.server.name, tmp_path / "ckpt")
    assert caught.value.running_on == "node-a"
    assert not (tmp_path / "ckpt").exists()
    check.more()
    check.finish()


def test_a_damaged_checkpoint_is_refused(stage: Stage, tmp_path: Path) -> None:
    directory = tmp_path / "ckpt"
    box = stage.box("plain", "a", ["sleep", "1000"], device=False)
    checkpoint(box.node, box.name, directory, leave_running=True)
    victim = directory / "images" / "inventory.img"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(MigrationError, match=r"inventory\.img.*damaged"):
        restore(stage.lab.node("b"), directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(MigrationError, match="version 99"):
        restore(stage.lab.node("b"), directory)
    assert stage.lab.node("b").call("list") == []


def test_a_failing_restore_leaves_nothing_and_can_be_repeated(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(stage)
    check.more()
    checkpoint(check.server.node, check.server.name, tmp_path / "ckpt")
    monkeypatch.setenv("MIGROCE_FAULT", "restore.end")
    with pytest.raises(MigrationError):
        restore(stage.lab.node("b"), tmp_path / "ckpt")
    monkeypatch.delenv("MIGROCE_FAULT")
    known = [info["id"] for info in stage.lab.node("b").call("list")]
    assert known == [check.client.name]
    restore(stage.lab.node("b"), tmp_path / "ckpt")
    check.server.home = "node-b"
    check.more()
    check.finish()
