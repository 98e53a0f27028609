# SPDX-License-Identifier: BSD-3-Clause
"""Live migration of containers that use RDMA: a RoCEv2 device that moves with its process."""

__version__ = "0.1.0"
