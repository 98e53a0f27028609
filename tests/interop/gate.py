# SPDX-License-Identifier: BSD-3-Clause
"""A client of ours connects when its server in the emulated machine listens, not before.

perftest's `-R` connects a second time at once, and does not survive being refused because its server does not
listen again yet (4.5 uses event channel and nodes after it has freed them; the same between two rdma_rxe). An
emulated server is always late. `c/gate.c` makes each rdma_connect ask here first.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def gate(shim: Path, library: Path, listens: Callable[[], bool]) -> Iterator[dict[str, str]]:
    """The environment of a program whose rdma_connect waits until `listens()` is true."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as door:
        path = str(Path(directory) / "gate")
        door.bind(path)
        door.listen()
        over = threading.Event()
        keeper = threading.Thread(target=_keep, args=(door, over, listens))
        keeper.start()
        try:
            yield {"LD_PRELOAD": f"{shim}:{library}", "GATE": path}
        finally:
            over.set()
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(path)
                keeper.join()


def _keep(door: socket.socket, over: threading.Event, listens: Callable[[], bool]) -> None:
    """Let callers pass, one after the other."""
    while not over.is_set():
        caller, _ = door.accept()
        with caller:
            while not over.wait(0.02) and not listens():
                pass
