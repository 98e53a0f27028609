# SPDX-License-Identifier: BSD-3-Clause
"""Slots: how the 2^24 QPNs behind one network namespace are divided among processes.

A namespace has 64 slots of 2^18 QPNs; a QPN's slot is its top six bits, by which the kernel steers
a packet to the process's socket. Pure bookkeeping, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from migroce.agent.errors import AgentError
from migroce.control import N_SLOTS, SLOT_QPNS, SLOT_SHIFT

T = TypeVar("T")


def qpn_base(slot: int) -> int:
    """The first QPN of a slot."""
    return slot << SLOT_SHIFT


def slot_of(qpn: int) -> int:
    """The slot of a QPN."""
    return qpn >> SLOT_SHIFT & (N_SLOTS - 1)


def check_range(slot: int, base: int, count: int) -> bool:
    """Whether a process may claim these: a whole slot, or everything (it once ran without an agent)."""
    if not 0 <= slot < N_SLOTS:
        return False
    return (base, count) == (qpn_base(slot), SLOT_QPNS) or (slot, base, count) == (0, 0, N_SLOTS * SLOT_QPNS)


class SlotTable(Generic[T]):
    """Who has which slot. An owner of the `whole` range leaves no slot for others."""

    __slots__ = ("_owners", "_whole")

    def __init__(self) -> None:
        self._owners: dict[int, T] = {}
        self._whole = False

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._owners))

    def owner(self, slot: int) -> T | None:
        """Who has it, or None."""
        return self._owners.get(slot)

    def allocate(self, owner: T) -> int:
        """The lowest free slot. AgentError ENOSPC when there is none."""
        for slot in range(N_SLOTS):
            if slot not in self._owners and not self._whole:
                self._owners[slot] = owner
                return slot
        why = "one process has all QPNs" if self._whole else f"all {N_SLOTS} are in use"
        raise AgentError(f"no slot is free in this network namespace: {why}", "ENOSPC")

    def reserve(self, slot: int, owner: T, *, whole: bool = False) -> None:
        """Take a given slot; again by the same owner is fine. AgentError EBUSY when it is not free."""
        holder = self._owners.get(slot)
        if holder is owner:
            return
        if holder is not None or self._whole or (whole and self._owners):
            raise AgentError(f"slot {slot} is in use by another process of this network namespace", "EBUSY")
        self._owners[slot] = owner
        self._whole = whole

    def release(self, slot: int) -> None:
        """Give it back; free ones may be released."""
        self._owners.pop(slot, None)
        if not self._owners:
            self._whole = False
