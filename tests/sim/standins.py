# SPDX-License-Identifier: BSD-3-Clause
"""The agent's stand-in, put into the simulated network at a stopped engine's old place."""

from __future__ import annotations

from dataclasses import dataclass

from migroce.agent.standin import Reply, StandIn
from migroce.dump import Dump

from .world import World


@dataclass(slots=True)
class _Place:
    standin: StandIn
    gid: bytes
    qpn_base: int
    qpn_count: int
    engine: int


class StandIns:
    """All stand-ins of a world, by number. `answered`: packets they sent when asked."""

    def __init__(self, world: World):
        self.world = world
        self.answered = 0
        self.announcing = True
        self.places: list[_Place] = []

    def add(self, dump: Dump, engine: int) -> int:
        """A stand-in for an engine's dump, not yet answering, on that engine's links; returns its number."""
        c = dump.context
        self.places.append(_Place(StandIn([dump]), c.gid, c.qpn_base, c.qpn_count, engine))
        return len(self.places) - 1

    def on(self, number: int) -> None:
        self._set(number, True)
        if self.announcing:
            for reply in self.places[number].standin.announce():
                self._send(reply, self.places[number])

    def off(self, number: int) -> None:
        self._set(number, False)

    def moved(self, number: int, gid: bytes) -> None:
        """It goes on at the old address and points to the new one."""
        self.places[number].standin.moved(gid)
        self.on(number)

    def _set(self, number: int, on: bool) -> None:
        p = self.places[number]
        self.world.standin(number, p.gid, on, p.qpn_base, p.qpn_count)

    def answer(self) -> None:
        """Serve the packets that wait."""
        while (packet := self.world.next_for_standin()) is not None:
            place = self.places[packet.to]
            for reply in place.standin.respond(packet.data, packet.src, packet.sport, packet.dst):
                self.answered += 1
                self._send(reply, place)

    def _send(self, reply: Reply, place: _Place) -> None:
        self.world.inject(
            reply.src_gid, reply.dst_gid, reply.data, sport=reply.src_port, icrc=False, sender=place.engine
        )
