# SPDX-License-Identifier: BSD-3-Clause
"""What is installed: a wheel with the device library in it, and scripts that are sound."""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from migroce import paths

ROOT = paths.source_tree()
assert ROOT is not None


def test_a_wheel_carries_the_library_and_finds_it(tmp_path: Path) -> None:
    compileall.compile_dir(ROOT / "src/migroce", quiet=1)  # as every run of the program leaves it
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path),
         f"--config-settings=build-dir={tmp_path / 'build'}", str(ROOT)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "migroce/lib/libmigroce.so" in names
    assert "migroce/py.typed" in names
    assert not [
        name for name in names if "libmgsim" in name or "__pycache__" in name or name.startswith("tests")
    ]
    found = subprocess.run(
        [sys.executable, "-c", "import migroce.paths as p; print(p.library())"],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(tmp_path / "site/migroce/lib/libmigroce.so")


@pytest.mark.parametrize("script", ["setup", "criu", "test", "lint", "fuzz"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], check=True)


def test_the_ci_entry_runs_make_test() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_no_host_name_of_a_registry_is_in_the_tree() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git work tree")
    # Written so that this file does not find itself.
    words = ["pypi" + ".org", "deb." + "debian.org", "archive." + "ubuntu.com", "artifact" + "ory"]
    found = subprocess.run(
        ["git", "-C", str(ROOT), "grep", "-lE", "|".join(word.replace(".", r"\.") for word in words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""
