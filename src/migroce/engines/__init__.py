# SPDX-License-Identifier: BSD-3-Clause
"""Container engines: what makes, lists, stops and moves containers on one node."""
