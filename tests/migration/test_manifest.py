# SPDX-License-Identifier: BSD-3-Clause
"""A checkpoint's description: what was written is read, what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from migroce.errors import MigrationError
from migroce.migration import manifest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a manifest and some files."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "pages-1.img").write_bytes(b"pages")
    (tmp_path / "layer.tar").write_bytes(b"")
    what = manifest.Manifest(
        container="c", node="node-a", created=1.5, about={"device": True}, neighbours=[], contexts=1, qps=4,
        running=False, files={},
    )  # fmt: skip
    manifest.write(tmp_path, what)
    return tmp_path


def _change(directory: Path, **changes: Any) -> None:
    path = directory / manifest.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written_is_read_and_holds(saved: Path) -> None:
    what = manifest.read(saved)
    assert (what.container, what.qps, what.about) == ("c", 4, {"device": True})
    assert set(what.files) == {"images/pages-1.img", "layer.tar"}
    manifest.verify(saved, what)


def test_fields_of_later_programs_are_passed_over(saved: Path) -> None:
    _change(saved, something_new=[1, 2])
    assert manifest.read(saved).container == "c"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "has version 2; this program knows up to 1"),
        ({"format": "tar"}, "does not describe a checkpoint of this program"),
        ({"version": "x"}, "is damaged"),
    ],
)
def test_what_is_not_ours_or_newer_is_refused(saved: Path, changes: dict[str, Any], words: str) -> None:
    _change(saved, **changes)
    with pytest.raises(MigrationError, match=words):
        manifest.read(saved)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "migroce-checkpoint", "version": 1}', "\0"])
def test_a_damaged_manifest_is_one_sentence(saved: Path, text: str) -> None:
    (saved / manifest.NAME).write_text(text)
    with pytest.raises(MigrationError, match=r"checkpoint: .*manifest\.json"):
        manifest.read(saved)


def test_a_directory_without_one_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="name a directory made by `migroce checkpoint`"):
        manifest.read(tmp_path)


def test_a_missing_or_changed_file_is_named(saved: Path) -> None:
    what = manifest.read(saved)
    (saved / "images" / "pages-1.img").write_bytes(b"PAGES")
    with pytest.raises(MigrationError, match=r"images/pages-1\.img in .* is damaged"):
        manifest.verify(saved, what)
    (saved / "images" / "pages-1.img").unlink()
    with pytest.raises(MigrationError, match=r"images/pages-1\.img is missing"):
        manifest.verify(saved, what)


def test_a_manifest_cannot_name_files_outside(saved: Path) -> None:
    _change(saved, files={"../outside": {"size": 0, "sha256": ""}})
    (saved.parent / "outside").touch()
    with pytest.raises(MigrationError, match="is missing"):
        manifest.verify(saved, manifest.read(saved))
