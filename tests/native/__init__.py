# SPDX-License-Identifier: BSD-3-Clause
"""The device over real sockets, in network namespaces made for the tests."""
