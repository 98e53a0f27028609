# SPDX-License-Identifier: BSD-3-Clause
"""What a migration tells while it goes on, and at its end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """A step of a checkpoint, restore or migration."""

    phase: str
    """check, prepare, stop, dump, transfer, restore, resume, commit; undo after a failure."""
    state: str
    """start, done or failed."""
    detail: str
    """For people, may be empty."""
    t: float
    """Unix time in seconds."""
    monotonic: float = 0.0
    """The same instant on CLOCK_MONOTONIC, for measuring."""


Progress = Callable[[Event], None]


def event(phase: str, state: str, detail: str = "") -> Event:
    """An event that happens now."""
    return Event(phase, state, detail, time.time(), time.monotonic())


@dataclasses.dataclass(slots=True)
class Report:
    """The end of a checkpoint, restore or migration that succeeded."""

    kind: str
    """migrate, checkpoint or restore."""
    container: str
    source: str
    destination: str
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    """Milliseconds of each phase, in order."""
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    """Milliseconds of what happens inside phases (freeze, criu dump, ...)."""
    blackout: float = 0.0
    """Milliseconds from the first stopped QP (or the freeze) until the container runs with its network."""
    total: float = 0.0
    """Milliseconds from beginning to end."""
    images_bytes: int = 0
    images_early_bytes: int = 0
    """Of the images, sent while the dump went on."""
    layer_bytes: int = 0
    """Of the writable layer, both copies."""
    layer_rest_bytes: int = 0
    """Of it, copied while the container stood still."""
    rdma_bytes: int = 0
    image_bytes: int = 0
    """Of the engine's image, if the destination did not have it."""
    contexts: int = 0
    qps: int = 0
    retransmissions: int | None = None
    """By the container's own QPs because of the move; None if not known."""
    qps_again: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of each moved QP: qpn, peer, peer_qpn, packets sent_again, (from its peer)
    received_again, and by the peer peer_sent_again, if it is on one of the two nodes."""
    ip: str | None = None
    """The new address, if it was to change."""
    directory: str | None = None
    """Of a checkpoint."""
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def bytes_moved(self) -> int:
        """Everything that went from node to node."""
        return self.images_bytes + self.layer_bytes + self.rdma_bytes + self.image_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "bytes_moved": self.bytes_moved}
