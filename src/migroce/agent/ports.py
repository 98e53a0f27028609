# SPDX-License-Identifier: BSD-3-Clause
"""All network namespaces the agent serves: one `Port` each, shared by the containers in it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Collection

from migroce.agent import netns
from migroce.agent.sockets import Port

log = logging.getLogger("migroce.agent")

_SWEEP_SECONDS = (0.01, 0.1, 1.0)

PortsState = dict[str, dict[str, list[list[int]]]]


class Ports:
    """The ports in use, by the identity of their namespace."""

    def __init__(self) -> None:
        self._ports: dict[netns.NetnsKey, Port] = {}
        self._orders: PortsState = {}
        self._timers: dict[netns.NetnsKey, asyncio.TimerHandle] = {}

    def get(self, fd: int) -> Port:
        """The port of a namespace; takes the descriptor over."""
        key = netns.key_of(fd)
        port = self._ports.get(key)
        if port is not None:
            os.close(fd)
            return port
        port = self._ports[key] = Port(fd)
        order = self._orders.pop(f"{key[0]}:{key[1]}", None)
        if order is not None:
            port.from_state(order)
            self._sweep(port, 0)  # before anything new is put behind what is left
        return port

    def release(self, port: Port, slot: int) -> None:
        """Give a slot back, closing its sockets, and the port with the last."""
        port.slots.release(slot)
        if len(port.slots):
            if port.release_sockets(slot):
                self._sweep_later(port, 0)
        else:
            self.trim(port)

    def follow(self, port: Port, slot: int, have: Collection[bytes]) -> list[socket.socket]:
        """The slot's sockets of further addresses, but those of `have`: `Port.follow`. AgentError."""
        found = port.follow(slot, have)
        if port.sweep():
            self._sweep_later(port, 0)
        return found

    def trim(self, port: Port) -> None:
        """Close a port that nobody uses."""
        if not len(port.slots):
            timer = self._timers.pop(port.key, None)
            if timer is not None:
                timer.cancel()
            self._ports.pop(port.key, None)
            port.close()

    def close(self) -> None:
        """Close all."""
        for timer in self._timers.values():
            timer.cancel()
        for port in self._ports.values():
            port.close()
        self._ports.clear()
        self._timers.clear()

    def to_state(self) -> PortsState:
        """The kernel's order of all groups, for the state file."""
        return {f"{dev}:{ino}": port.to_state() for (dev, ino), port in self._ports.items()}

    def from_state(self, state: PortsState) -> None:
        """What a killed agent left, used when its namespaces are met again."""
        self._orders = state

    def _sweep_later(self, port: Port, attempt: int) -> None:
        """Somebody keeps a closed socket open, or a process has not come back: look again later."""
        if port.key in self._timers:
            return
        delay = _SWEEP_SECONDS[min(attempt, len(_SWEEP_SECONDS) - 1)]
        self._timers[port.key] = asyncio.get_running_loop().call_later(delay, self._sweep, port, attempt + 1)

    def _sweep(self, port: Port, attempt: int) -> None:
        self._timers.pop(port.key, None)
        if self._ports.get(port.key) is not port:
            return
        was_uncertain = port.uncertain
        if port.sweep():
            self._sweep_later(port, attempt)
        if port.uncertain and not was_uncertain:
            log.warning(
                "several processes ended while no agent ran: packets may reach the wrong one of "
                "those that are left in network namespace %d",
                port.key[1],
            )
