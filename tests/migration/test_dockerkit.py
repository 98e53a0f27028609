# SPDX-License-Identifier: BSD-3-Clause
"""A Docker container's images in memory, outside of all that is a lab's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from migroce.lab import docker
from migroce.migration import dockerkit


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where images of the migration test-PID are in memory."""
    monkeypatch.setattr(dockerkit, "_SPARE", 0)
    path = Path(f"/dev/shm/migroce-test-{os.getpid()}")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def migration(state: Path) -> Path:
    where = state / "node-a/migrations/one"
    where.mkdir(parents=True)
    return where


def put(where: Path) -> Path:
    return dockerkit.place(where, 1, f"test-{os.getpid()}", None)


def test_a_lab_that_is_taken_down_in_the_middle_of_a_move_leaves_no_images(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker, "_DATA", tmp_path / "data")
    assert put(migration(tmp_path)) == place
    (place / "pages-1.img").touch()
    docker.withdraw("lab", tmp_path)
    assert not place.exists()


def test_who_is_killed_while_it_makes_room_has_said_where(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = migration(tmp_path)
    make = Path.mkdir

    def killed(path: Path, mode: int = 0o777) -> None:
        make(path, mode)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", killed)
    with pytest.raises(KeyboardInterrupt):
        put(where)
    assert place.exists()
    dockerkit.release(where)
    assert not place.exists()


def test_what_others_have_there_is_left_alone(place: Path, tmp_path: Path) -> None:
    where = migration(tmp_path)
    place.mkdir()
    assert put(where) == dockerkit.placed(where) == where / "mem"
    dockerkit.release(where)
    assert place.exists()
    assert not (where / "mem").exists()
