# SPDX-License-Identifier: BSD-3-Clause
"""What the demo knows at any moment: filled by the sampler and the migration, shown by the view."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from migroce.report.rdma import state_name
from migroce.report.series import Series
from migroce.report.timeline import Span


@dataclass(slots=True)
class End:
    """One of the two programs."""

    container: str
    role: str
    address: str
    node: str
    """Where it was last seen."""
    received: Series = field(default_factory=Series)
    """Payload bytes received."""
    sent: Series = field(default_factory=Series)
    qps: str = "-"
    """States of its QPs, `RTS` or `RTS, paused`."""
    counters: Mapping[str, int] = field(default_factory=dict)
    connected: bool = False
    """Its QPs are in RTS and have learned that the peer can be moved."""
    exit_status: int | None = None
    done: bool = False

    def take(self, now: float, node: str, entry: Mapping[str, Any]) -> None:
        """A sample: the container as the agent of `node` has it in its `ps`; `now` in seconds."""
        dumps = [dump for context in entry["contexts"] if (dump := context.get("dump")) is not None]
        qps = [qp for dump in dumps for qp in dump["qps"]]
        if not qps:
            return
        if entry["state"] in ("running", "resuming"):
            self.node = node
        elif self.node != node:
            return
        self.counters = dumps[0]["counters"]
        self.received.add(now, int(self.counters["rx_bytes"]))
        self.sent.add(now, int(self.counters["tx_bytes"]))
        self.qps = " ".join(sorted({state_name(qp) for qp in qps}))
        self.connected = all(qp["state"] == "RTS" and qp["peer_capable"] for qp in qps)


@dataclass(slots=True)
class DemoState:
    """Everything shown. Written by several threads: fields are replaced, not changed in place."""

    moving: End
    static: End
    spans: list[Span] = field(default_factory=list)
    """Finished phases in order (seconds of time.monotonic)."""
    current: tuple[str, float] | None = None
    """The phase that runs, and since when."""
    message: str = ""
    failed: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ends(self) -> tuple[End, End]:
        """Both."""
        return (self.moving, self.static)

    def phase(self, name: str, state: str, now: float) -> None:
        """A migration's event: `state` is start, done or failed. `now` in seconds."""
        with self.lock:
            if state == "start":
                self.current = (name, now)
                return
            began = self.current[1] if self.current and self.current[0] == name else now
            self.spans = [*self.spans, Span(name, began, now)]
            self.current = None
            if state == "failed":
                self.failed = name
