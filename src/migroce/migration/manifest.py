# SPDX-License-Identifier: BSD-3-Clause
"""`manifest.json` of a checkpoint directory: what is in it, how to check it.

    manifest.json   this
    images/         CRIU's images and the runtime's descriptors.json
    rdma/           rdma-<slot>.dump, one per RDMA context (migroce.dump reads them)
    layer.tar       the container's writable layer (PAX, GNU tar's xattrs)
    shm.tar         its /dev/shm

Versioned; fields are only ever added. A reader refuses a higher `version`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from migroce.engines.context import write_json
from migroce.errors import MigrationError

FORMAT = "migroce-checkpoint"
VERSION = 1
NAME = "manifest.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint's description."""

    container: str
    node: str
    """Spec of the node it was taken on."""
    created: float
    """Unix time."""
    about: dict[str, Any]
    """What a destination needs: config, metadata, interfaces, memory (see SourceSide.describe)."""
    neighbours: list[dict[str, Any]]
    contexts: int
    qps: int
    running: bool
    """Whether the container was left running."""
    files: dict[str, dict[str, Any]]
    """Relative path: size and sha256."""
    version: int = VERSION
    format: str = FORMAT


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, with the files' checksums, as the last of a checkpoint. Raises OSError."""
    files = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (NAME, NAME + "~")
    }
    write_json(directory / NAME, dataclasses.asdict(dataclasses.replace(manifest, files=files)))


def read(directory: Path) -> Manifest:
    """The manifest of a checkpoint, not yet verified. Raises MigrationError."""
    path = directory / NAME
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise MigrationError("checkpoint", f"{path} does not describe a checkpoint of this program")
        if int(raw["version"]) > VERSION:
            raise MigrationError(
                "checkpoint", f"{path} has version {raw['version']}", f"this program knows up to {VERSION}"
            )
        known = {field.name for field in dataclasses.fields(Manifest)}
        return Manifest(**{key: value for key, value in raw.items() if key in known})
    except FileNotFoundError as exc:
        mend = "name a directory made by `migroce checkpoint`"
        raise MigrationError("checkpoint", f"{directory} holds no {NAME}", mend) from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise MigrationError("checkpoint", f"{path} is damaged: {exc}", "take the checkpoint again") from exc


def verify(directory: Path, manifest: Manifest) -> None:
    """Compare every file with its size and checksum. Raises MigrationError naming the first that differs."""
    for name, known in manifest.files.items():
        path = directory / name
        if ".." in Path(name).parts or not path.is_file():
            raise MigrationError("checkpoint", f"{name} is missing from {directory}", "copy it again, whole")
        if path.stat().st_size != known["size"] or digest(path) != known["sha256"]:
            raise MigrationError(
                "checkpoint", f"{name} in {directory} is damaged", "copy it or take the checkpoint again"
            )
