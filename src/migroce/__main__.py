# SPDX-License-Identifier: BSD-3-Clause
"""`python -m migroce`: the same as the `migroce` command."""

from migroce.cli import main

main()
