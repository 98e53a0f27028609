# SPDX-License-Identifier: BSD-3-Clause
"""`python -m migroce.agent --run-dir DIR`: run the agent in the foreground."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import socket
import sys
from pathlib import Path

from migroce.agent.errors import AgentError
from migroce.agent.server import Agent
from migroce.paths import run_dir

NICE = -10
"""The agent's priority where it may choose; it works for some ms per stop or resume only."""


def main() -> int:
    """Parse, serve, return the exit status: 0 ended as told, 1 could not start, 2 bad usage."""
    parser = argparse.ArgumentParser(
        prog="migroce agent",
        description="The RDMA device's control plane on this node: hands out sockets and id ranges, stops "
        "and resumes containers' QPs, and answers for stopped containers. Ends on SIGTERM or SIGINT; "
        "processes go on without it and find a new one by themselves.",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=run_dir(),
        metavar="DIR",
        help="its sockets and state (default: %(default)s)",
    )
    parser.add_argument("--node", default="", help="this node's name in `status` (default: the host's)")
    parser.add_argument(
        "--idle-exit",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="end after so long without process, container, client or migration (default: never)",
    )
    parser.add_argument(
        "--ready-fd",
        type=int,
        default=-1,
        metavar="FD",
        help="write a line to this descriptor when it listens, and close it",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="also say what goes well")
    args = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        stream=sys.stderr,
        format="migroce agent: %(message)s",
    )
    with contextlib.suppress(OSError, ValueError):  # two sockets and a connection for each process
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):  # applications spin on every core: a stop must not wait for them
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    try:
        asyncio.run(serve(args.run_dir.absolute(), args.node, args.idle_exit, args.ready_fd))
    except AgentError as e:
        print(f"migroce agent: {e}", file=sys.stderr)
        return 1
    return 0


async def serve(directory: Path, node: str, idle_exit: float, ready_fd: int) -> None:
    """Run an agent until it is told to end. AgentError when it cannot start."""
    agent = Agent(directory, node=node, idle_exit=idle_exit)
    try:
        await agent.start()
    except BaseException:
        await agent.close()
        raise
    _tell_ready(ready_fd)
    await agent.run()


def _tell_ready(ready_fd: int) -> None:
    with contextlib.suppress(OSError):
        if ready_fd >= 0:
            os.write(ready_fd, b"ready\n")
            os.close(ready_fd)
    name = os.environ.pop("NOTIFY_SOCKET", "")  # systemd
    if name:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", "\0" + name[1:] if name[0] == "@" else name)


if __name__ == "__main__":
    sys.exit(main())
