# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoint, restore and migration of containers with the plain OCI engine."""
