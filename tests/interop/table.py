# SPDX-License-Identifier: BSD-3-Clause
"""docs/interop.md's table, from the results of a whole run."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BEGIN, END = "<!-- written by make test-interop: begin -->", "<!-- written by make test-interop: end -->"
COLUMNS = ("to migroce", "to rdma_rxe")
"""Where the server is: each row is run in both directions."""


@dataclass
class Results:
    """(group, title) -> column -> passed?"""

    cells: dict[tuple[str, str], dict[str, bool]] = field(default_factory=dict)
    kernel: str = ""

    def note(self, item: pytest.Item, *, passed: bool) -> None:
        """A test's result, if it is a cell of the table."""
        for name, value in item.user_properties:
            if name == "cell":
                group, title, column = value  # type: ignore[misc]
                row = self.cells.setdefault((group, title), {})
                row[column] = row.get(column, True) and passed

    def write(self, page: Path) -> None:
        """Put the table between the marks of a page."""
        text = page.read_text()
        head, rest = text.split(BEGIN)
        tail = rest.split(END)[1]
        page.write_text(f"{head}{BEGIN}\n{self._render()}\n{END}{tail}")

    def _render(self) -> str:
        version = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version}", "perftest"], capture_output=True, text=True, check=False
        ).stdout
        good = sum(each for row in self.cells.values() for each in row.values())
        count = sum(len(row) for row in self.cells.values())
        where = f"rdma_rxe of Linux {self.kernel}; perftest {version or '?'} at our end."
        lines = [f"{where} {good} of {count} passed."]
        group = ""
        for (title_group, title), row in self.cells.items():
            if title_group != group:
                group = title_group
                lines += ["", f"**{group}**", "", f"| | {' | '.join(COLUMNS)} |", "|---|---|---|"]
            marks = [{True: "yes", False: "**no**", None: ""}[row.get(column)] for column in COLUMNS]
            lines.append(f"| {title} | {' | '.join(marks)} |")
        return "\n".join(lines)


def cell(request: pytest.FixtureRequest, group: str, title: str, column: str) -> None:
    """Make the running test a cell of the table."""
    request.node.user_properties.append(("cell", (group, title, column)))
