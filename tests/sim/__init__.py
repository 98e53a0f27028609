# SPDX-License-Identifier: BSD-3-Clause
"""Deterministic simulation of the real C transport: see README.md in this directory."""
