/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * dump.h - layout of a context's dump. Little-endian, packed, append-only: records may grow at
 * their end (a reader takes the part it knows) and new record types may come (a reader skips
 * them). src/migroce/dump.py mirrors this file.
 *
 *   header | record* | end record
 *   record: u16 type, u16 version, u32 length of body | body (padded to 8 with zeros, length too)
 *   the end record's body is u32 crc (CRC-32 of all bytes before the end record), u32 zero
 */
#ifndef MG_DUMP_H
#define MG_DUMP_H

#include <stdint.h>

#define MG_DUMP_MAGIC "MGDUMP\r\n" /* 8 bytes; the line end shows text-mode damage */
#define MG_DUMP_VERSION 1u

struct mg_dump_header { /* 32 bytes */
	char magic[8];
	uint32_t version;
	uint32_t header_len; /* 32 */
	uint64_t total_len;  /* whole dump, bytes */
	uint32_t n_records;  /* with the end record */
	uint32_t flags;	     /* bit 0: the context was stopped (else a live snapshot) */
} __attribute__((packed));

struct mg_dump_record {
	uint16_t type;
	uint16_t version; /* 1 */
	uint32_t length;
} __attribute__((packed));

enum mg_dump_type {
	MG_DUMP_CONTEXT = 1,
	MG_DUMP_PD = 2,
	MG_DUMP_MR = 3,
	MG_DUMP_CQ = 4,
	MG_DUMP_QP = 5,
	MG_DUMP_RESOURCE = 6, /* one entry of a responder's read/atomic replay record */
	MG_DUMP_COUNTERS = 7, /* u64 each, in enum mg_counter's order */
	MG_DUMP_SRQ = 8,
	MG_DUMP_AH = 9,
	MG_DUMP_XRCD = 10,
	MG_DUMP_MCAST = 11, /* a UD QP's membership in a multicast group */
	MG_DUMP_MW = 12,
	MG_DUMP_END = 0xffff,
};

struct mg_dump_context { /* 64 bytes */
	uint8_t gid[16];
	uint32_t qpn_base;
	uint32_t qpn_count;
	uint32_t slot;
	uint32_t epoch;
	uint32_t max_path_mtu;
	uint32_t n_qp, n_mr, n_cq, n_pd;
	uint32_t n_srq, n_xrcd;
	uint32_t rsv;
} __attribute__((packed));

struct mg_dump_pd { /* 8 bytes */
	uint32_t handle;
	uint32_t refs;
} __attribute__((packed));

struct mg_dump_mr { /* 40 bytes */
	uint64_t addr, length, iova;
	uint32_t lkey, rkey, access, pd;
} __attribute__((packed));

struct mg_dump_mw {	     /* 40 bytes */
	uint32_t rkey, type; /* enum ibv_mw_type */
	uint32_t pd, access;
	uint32_t mr;  /* lkey of the region it is bound to; 0: not bound */
	uint32_t qpn; /* type 2: of the QP it is bound by */
	uint64_t addr, length;
} __attribute__((packed));

struct mg_dump_cq {			     /* 32 bytes */
	uint32_t handle, depth, fill, armed; /* armed: 0 no, 1 next, 2 solicited */
	uint64_t total;			     /* completions ever */
	uint32_t channel; /* its completion channel: 1 + the descriptor's number; 0: none */
	uint32_t events;  /* told to the channel and not fetched yet */
} __attribute__((packed));

enum mg_dump_mstate {
	MG_MSTATE_NORMAL = 0,
	MG_MSTATE_STOPPED = 1,
	MG_MSTATE_PAUSED = 2,
	MG_MSTATE_RESUMING = 3
};

struct mg_dump_qp {		   /* 256 bytes */
	uint32_t qpn, type, state; /* enum ibv_qp_type, enum ibv_qp_state */
	uint32_t mstate;
	uint32_t pd, send_cq, recv_cq, srq; /* handles; 0: none */
	uint32_t peer_qpn;
	uint32_t path_mtu; /* bytes */
	uint32_t peer_capable, have_peer_token, token_acked;
	uint32_t epoch, peer_epoch;
	uint32_t sport;
	uint8_t local_gid[16], peer_gid[16];
	uint8_t token[16], peer_token[16];
	uint32_t una_psn;  /* oldest unacknowledged request */
	uint32_t next_psn; /* next new request */
	uint32_t epsn;	   /* responder: expected */
	uint32_t msn;
	uint32_t sq_depth, sq_fill, rq_depth, rq_fill;
	uint32_t retry_cnt, rnr_retry, timeout, min_rnr_timer; /* as set by modify_qp */
	uint32_t n_resources;
	uint32_t tclass_hop; /* tclass << 8 | hop limit */
	uint64_t tx_packets, rx_packets, tx_bytes, rx_bytes, retransmits, duplicates, send_done, recv_done;
	uint32_t xrcd; /* handle */
	uint32_t qkey; /* UD */
} __attribute__((packed));

struct mg_dump_ah { /* 56 bytes */
	uint32_t handle, pd;
	uint8_t sgid[16], dgid[16];
	uint32_t sgid_index, flow_label;
	uint32_t tclass_hop; /* as in mg_dump_qp */
	uint32_t rsv;
} __attribute__((packed));

struct mg_dump_mcast { /* 24 bytes */
	uint8_t gid[16];
	uint32_t qpn;
	uint32_t rsv;
} __attribute__((packed));

struct mg_dump_srq {	       /* 48 bytes */
	uint32_t handle, num;  /* num: what XRC requests name it by */
	uint32_t pd, cq, xrcd; /* handles; cq, xrcd: of an XRC one, else 0 */
	uint32_t depth, fill, max_sge;
	uint32_t limit; /* armed for the limit event below this fill; 0: not armed */
	uint32_t refs;	/* QPs */
	uint64_t total; /* receive requests taken ever */
} __attribute__((packed));

struct mg_dump_xrcd { /* 8 bytes */
	uint32_t handle;
	uint32_t refs; /* SRQs and QPs */
} __attribute__((packed));

struct mg_dump_resource {     /* 40 bytes */
	uint32_t qpn, opcode; /* MG_OP_READ_REQ, MG_OP_CMP_SWAP, MG_OP_FETCH_ADD */
	uint32_t first_psn, last_psn;
	uint64_t va;
	uint32_t rkey, length;
	uint64_t atomic_orig;
} __attribute__((packed));

_Static_assert(sizeof(struct mg_dump_header) == 32, "dump header");
_Static_assert(sizeof(struct mg_dump_context) == 64, "dump context");
_Static_assert(sizeof(struct mg_dump_mr) == 40, "dump mr");
_Static_assert(sizeof(struct mg_dump_mw) == 40, "dump mw");
_Static_assert(sizeof(struct mg_dump_cq) == 32, "dump cq");
_Static_assert(sizeof(struct mg_dump_qp) == 256, "dump qp");
_Static_assert(sizeof(struct mg_dump_resource) == 40, "dump resource");
_Static_assert(sizeof(struct mg_dump_ah) == 56, "dump ah");
_Static_assert(sizeof(struct mg_dump_mcast) == 24, "dump mcast");
_Static_assert(sizeof(struct mg_dump_srq) == 48, "dump srq");
_Static_assert(sizeof(struct mg_dump_xrcd) == 8, "dump xrcd");

#endif
