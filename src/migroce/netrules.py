# SPDX-License-Identifier: BSD-3-Clause
"""nftables' rules that keep a container's network quiet but for RoCE, which the agent's stand-in answers."""

from __future__ import annotations

TABLE = "migroce_lock"
LOCK = f"""
add table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
	chain in {{
		type filter hook input priority -400; policy drop;
		udp dport 4791 accept
		icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
	}}
	chain out {{
		type filter hook output priority -400; policy drop;
		udp dport 4791 accept
		icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
	}}
}}
"""
"""What nft reads to lock a namespace; locked already is fine."""
UNLOCK = f"add table inet {TABLE}\ndelete table inet {TABLE}\n"
"""What it reads to unlock one; not locked is fine."""
