"""The command line of migroce."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `migroce` command."""
    raise SystemExit("not built yet")
