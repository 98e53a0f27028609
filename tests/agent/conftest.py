# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the agent's tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .rig import Agent, Fake, Peer, Wires

_numbers = itertools.count()


@pytest.fixture
def wires() -> Iterator[Wires]:
    """Namespaces a and b; needs root."""
    if os.geteuid():
        pytest.skip("needs root: network namespaces")
    made = Wires(f"{os.getpid()}-{next(_numbers)}")
    yield made
    made.close()


@pytest.fixture
def start_agent(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Starts agents, each with a run directory of its own."""
    agents: list[Agent] = []

    def start(*args: str, **more: Any) -> Agent:
        agents.append(Agent(tmp_path / f"run{len(agents)}", *args, **more))
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


@pytest.fixture
def agent(start_agent: Callable[..., Agent], wires: Wires) -> Agent:
    """One agent, in namespace a as on a node."""
    return start_agent(wires=wires)


@pytest.fixture
def start_fake() -> Iterator[Callable[..., Fake]]:
    """Starts fake processes."""
    fakes: list[Fake] = []

    def start(*args: Any, **more: Any) -> Fake:
        fakes.append(Fake(*args, **more))
        return fakes[-1]

    yield start
    for fake in fakes:
        fake.close()


@pytest.fixture
def start_peer(wires: Wires) -> Iterator[Callable[..., Peer]]:
    """Makes peers in namespace b."""
    peers: list[Peer] = []

    def start(*args: Any, **more: Any) -> Peer:
        peers.append(Peer(wires, *args, **more))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()
