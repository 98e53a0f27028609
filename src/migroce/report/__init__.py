# SPDX-License-Identifier: BSD-3-Clause
"""What people look at: the terminal, tables, plots."""
