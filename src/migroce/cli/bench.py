# SPDX-License-Identifier: BSD-3-Clause
"""`migroce bench`."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add `bench` to the application."""

    @app.command(
        rich_help_panel="This machine",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def bench(context: typer.Context) -> None:
        """Measure speed, latency, blackout and memory, each beside its yardstick (root, work tree)."""
        import os
        import sys

        from migroce import paths
        from migroce.errors import MigroceError

        root = paths.source_tree()
        if root is None or not (root / "bench" / "__main__.py").is_file():
            raise MigroceError(
                "the benchmarks are not part of an installed package: clone the repository, `make bench`"
            )
        sys.stdout.flush()
        os.chdir(root)
        os.execv(sys.executable, [sys.executable, "-m", "bench", *context.args])
