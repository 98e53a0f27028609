# SPDX-License-Identifier: BSD-3-Clause
"""Docker contexts: names that `docker context create` gives to Docker hosts, read where it keeps them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path


def host_of(name: str) -> str | None:
    """The address that the context `name` has, as DOCKER_HOST would; None if there is none of that name."""
    base = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    meta = base / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return str(json.loads(meta.read_text())["Endpoints"]["docker"]["Host"])
    return None
