# SPDX-License-Identifier: BSD-3-Clause
"""CRIU's cache of what the kernel can do, where /run is no tmpfs.

CRIU keeps it only on a tmpfs, because it must not outlive a boot; without it, each of its runs probes the
kernel for 25-60 ms, twice in each blackout. So let CRIU make one in a private /run, and bind it where
it is looked for: a mount does not outlive a boot either.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from migroce import paths
from migroce.engines import mounts

CACHE = Path("/run/criu.kdat")
_MAKE = 'mount -t tmpfs migroce /run && "$1" check >/dev/null 2>&1; cat /run/criu.kdat'


def provide(criu: Path | None) -> None:
    """Have a cache, if there is none and CRIU would not keep its own. A failure only costs time."""
    ours = paths.run_dir() / "criu.kdat"
    if criu is None or _filesystem("/run") == "tmpfs" or mounts.below(CACHE):
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MAKE, "sh", str(criu)]
        made = subprocess.run(argv, capture_output=True, timeout=20, check=False).stdout
        if not made:
            return
        ours.write_bytes(made)
        CACHE.touch()
        mounts.bind(ours, CACHE)


def withdraw() -> None:
    """Remove the cache that `provide` made; none is fine."""
    ours = paths.run_dir() / "criu.kdat"
    if not ours.exists():
        return
    with contextlib.suppress(OSError):
        mounts.unmount(CACHE)
        CACHE.unlink()
    ours.unlink()


def _filesystem(path: str) -> str:
    kinds = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kinds[fields.split()[4]] = rest.split()[0]
    return kinds.get(path, "")
