# SPDX-License-Identifier: BSD-3-Clause
"""The connection manager's C sources alone, as a fixture."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cm_native import Native

CM = Path(__file__).resolve().parents[2] / "native" / "cm"


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """Codec and state machines. Under MIGROCE_SANITIZER with UBSan (ASan runs them in tests/fuzz)."""
    out = tmp_path_factory.mktemp("cm") / "libcm.so"
    flags = ["-std=c17", "-O1", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    flags.append("-Wno-missing-field-initializers")
    if os.environ.get("MIGROCE_SANITIZER"):
        flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    sources = map(str, sorted(CM.glob("*.c")))
    subprocess.run(["cc", *flags, f"-I{CM.parent}", *sources, "-o", str(out)], check=True)
    return Native(CM, out)
