# SPDX-License-Identifier: BSD-3-Clause
"""The C codec as a fixture, described to cffi by its own header."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from wire_native import Native, declarations

WIRE = Path(__file__).resolve().parents[2] / "native" / "wire"


def _library(tmp: Path) -> Path:
    """The codec alone: its tests depend on no other part being built.

    Under MIGROCE_SANITIZER with UBSan, which needs no runtime in front; ASan runs it in tests/fuzz.
    """
    out = tmp / "libwire.so"
    sources = map(str, sorted(WIRE.glob("*.c")))
    flags = ["-std=c17", "-O2", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    if os.environ.get("MIGROCE_SANITIZER"):
        flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run(
        ["cc", *flags, f"-I{WIRE.parent}", *sources, "-o", str(out), "-l:libdeflate.a"], check=True
    )
    return out


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """The C codec."""
    library = _library(tmp_path_factory.mktemp("wire"))
    return Native(declarations((WIRE / "wire.h").read_text()), library)
