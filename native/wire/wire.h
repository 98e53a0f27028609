/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * wire.h - RoCEv2 packets: opcodes, headers, ICRC.
 *
 * Pure functions over byte buffers: no allocation, no clock, no state but constant tables.
 * Layout and names follow the InfiniBand Architecture Specification (IBA) vol. 1, chapter 9,
 * RoCEv2 annex A17, and docs/protocol.md for what migroce adds.
 */
#ifndef MG_WIRE_H
#define MG_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define MG_ROCE_PORT 4791u
#define MG_PSN_MASK 0xffffffu
#define MG_QPN_MASK 0xffffffu
#define MG_BTH_LEN 12u
#define MG_ICRC_LEN 4u
#define MG_HDR_MAX 64u /* BTH and every extended header an opcode can carry */
#define MG_MEH_LEN 48u
#define MG_PKEY_DEFAULT 0xffffu

/* BTH byte 4: FECN, BECN and six reserved bits, all masked in the ICRC. */
#define MG_BTH4_CAPABLE 0x01u /* the sender speaks the migration extension (docs/protocol.md) */

/* Opcodes (IBA table 38). The top three bits are the transport service. */
enum mg_service {
	MG_SVC_RC = 0x00,
	MG_SVC_UC = 0x20,
	MG_SVC_RD = 0x40,
	MG_SVC_UD = 0x60,
	MG_SVC_XRC = 0xa0,
	MG_SVC_MIG = 0xc0
};
#define MG_SVC_MASK 0xe0u

enum mg_opcode {
	MG_OP_SEND_FIRST = 0,
	MG_OP_SEND_MIDDLE = 1,
	MG_OP_SEND_LAST = 2,
	MG_OP_SEND_LAST_IMM = 3,
	MG_OP_SEND_ONLY = 4,
	MG_OP_SEND_ONLY_IMM = 5,
	MG_OP_WRITE_FIRST = 6,
	MG_OP_WRITE_MIDDLE = 7,
	MG_OP_WRITE_LAST = 8,
	MG_OP_WRITE_LAST_IMM = 9,
	MG_OP_WRITE_ONLY = 10,
	MG_OP_WRITE_ONLY_IMM = 11,
	MG_OP_READ_REQ = 12,
	MG_OP_READ_RESP_FIRST = 13,
	MG_OP_READ_RESP_MIDDLE = 14,
	MG_OP_READ_RESP_LAST = 15,
	MG_OP_READ_RESP_ONLY = 16,
	MG_OP_ACK = 17,
	MG_OP_ATOMIC_ACK = 18,
	MG_OP_CMP_SWAP = 19,
	MG_OP_FETCH_ADD = 20,
	MG_OP_SEND_LAST_INV = 22,
	MG_OP_SEND_ONLY_INV = 23,
	MG_OP_FLUSH = 28,
	MG_OP_ATOMIC_WRITE = 29,

	/* Manufacturer-defined range (0xc0-0xff), docs/protocol.md. */
	MG_OP_RESUME = 0xc0,
	MG_OP_RESUME_ACK = 0xc1,
	MG_OP_TOKEN = 0xc2,
	MG_OP_TOKEN_ACK = 0xc3,
};

/* Header bits of struct mg_opinfo.mask and struct mg_hdrs.mask. */
enum mg_hdr_bit {
	MG_H_RETH = 1u << 0,	  /* 16 bytes: va, rkey, length */
	MG_H_AETH = 1u << 1,	  /* 4 bytes: syndrome, msn */
	MG_H_ATOMIC = 1u << 2,	  /* 28 bytes: va, rkey, swap/add, compare */
	MG_H_ATOMICACK = 1u << 3, /* 8 bytes: original value */
	MG_H_IMM = 1u << 4,	  /* 4 bytes */
	MG_H_IETH = 1u << 5,	  /* 4 bytes: rkey to invalidate */
	MG_H_DETH = 1u << 6,	  /* 8 bytes: qkey, source QPN */
	MG_H_MEH = 1u << 7,	  /* 48 bytes: migroce extended header */
	MG_H_PAYLOAD = 1u << 8,	  /* may carry payload */
	/* Properties of the opcode, not headers: */
	MG_P_REQUEST = 1u << 9, /* goes to the responder (else to the requester) */
	MG_P_FIRST = 1u << 10,	/* starts a message of several packets */
	MG_P_MIDDLE = 1u << 11,
	MG_P_LAST = 1u << 12, /* ends a message of several packets */
	MG_P_ONLY = 1u << 13,
	MG_P_SEND = 1u << 14, /* uses a receive WQE for its data */
	MG_P_WRITE = 1u << 15,
	MG_P_READ = 1u << 16,
	MG_P_ATOMIC = 1u << 17,
	MG_P_CONTROL = 1u << 18,  /* migration extension */
	MG_H_XRCETH = 1u << 19,	  /* 4 bytes: the SRQ's number (XRC requests) */
	MG_P_ANSWERED = 1u << 20, /* a request that only its own answer acknowledges */
	MG_H_FETH = 1u << 21,	  /* 4 bytes: kind and range of a flush */
};

struct mg_opinfo {
	const char *name; /* e.g. "RC SEND_ONLY"; NULL: opcode not known */
	uint32_t mask;	  /* mg_hdr_bit */
	uint8_t hdr_len;  /* bytes from BTH to payload */
};

/* Indexed by BTH opcode, 256 entries: the one place that knows what an opcode carries. */
extern const struct mg_opinfo mg_opinfo[256];

/* FETH (IBA annex A19): where data must have got to, and which. */
enum mg_flush_type { MG_FLUSH_GLOBAL = 1, MG_FLUSH_PERSISTENT = 2 };
enum mg_flush_level { MG_FLUSH_RANGE = 0, MG_FLUSH_MR = 1 };

/* AETH syndrome (IBA 9.7.5.1): bits 6-5 the kind, bits 4-0 credits, RNR timer or NAK code. */
#define MG_AETH_ACK 0x1fu /* ACK, credit field "invalid" as the kernel's driver sends it */
#define MG_AETH_KIND 0x60u
#define MG_AETH_RNR 0x20u
#define MG_AETH_NAK 0x60u
enum mg_nak {
	MG_NAK_PSN_SEQ = 0x60,
	MG_NAK_INVALID_REQ = 0x61,
	MG_NAK_REM_ACCESS = 0x62,
	MG_NAK_REM_OP = 0x63,
	MG_NAK_INV_RD = 0x64,
	MG_NAK_STOPPED = 0x7f, /* reserved code 31: "stopped, being moved" (docs/protocol.md) */
};

/* The migration extension's header, payload of MG_SVC_MIG opcodes (docs/protocol.md). */
struct mg_meh {
	uint8_t version; /* 1 */
	uint8_t flags;
	uint32_t src_qpn; /* 24 bits: the sender's QPN */
	uint32_t epoch;	  /* the sender's move counter */
	uint32_t psn;	  /* 24 bits: PSN the sender's responder expects next */
	uint8_t token[16];
	uint8_t gid[16]; /* the sender's address from now on */
};

/* A packet's headers, host byte order. `mask` says which of the extended headers are valid. */
struct mg_hdrs {
	uint8_t opcode;
	bool solicited;
	bool migreq; /* BTH M bit; always 0, as the kernel sends it */
	bool ackreq;
	bool capable; /* MG_BTH4_CAPABLE */
	bool fecn, becn;
	uint8_t pad; /* 0-3 bytes after the payload */
	uint16_t pkey;
	uint32_t dest_qpn; /* 24 bits */
	uint32_t psn;	   /* 24 bits */
	uint32_t xrc_srqn; /* 24 bits */
	uint32_t mask;	   /* copy of mg_opinfo[opcode].mask */
	struct {
		uint64_t va;
		uint32_t rkey;
		uint32_t length;
	} reth;
	struct {
		uint8_t syndrome;
		uint32_t msn; /* 24 bits */
	} aeth;
	struct {
		uint64_t va;
		uint32_t rkey;
		uint64_t swap_add;
		uint64_t compare;
	} atomic;
	struct {
		uint8_t type;  /* enum mg_flush_type bits */
		uint8_t level; /* 0: the RETH's range, 1: the whole region */
	} feth;
	uint64_t atomic_orig;
	uint32_t imm;  /* host order */
	uint32_t ieth; /* rkey */
	struct {
		uint32_t qkey;
		uint32_t src_qpn;
	} deth;
	struct mg_meh meh;
	const uint8_t *payload; /* into the parsed buffer */
	uint32_t payload_len;	/* without pad and ICRC */
};

/*
 * Parse a UDP payload (BTH .. ICRC, `len` bytes) into *h. Does not check the ICRC.
 * Returns 0, or -EBADMSG when it is too short for its opcode's headers, has an unknown opcode,
 * a transport header version other than 0, a pad count beyond the payload, or a payload (pad
 * included) where the opcode carries none. Bytes behind the header of an MG_P_CONTROL packet are
 * accepted as payload: later versions may append. h->payload points into buf.
 */
int mg_hdrs_parse(const uint8_t *buf, size_t len, struct mg_hdrs *h);

/*
 * Write BTH and extended headers of *h to `out` (at least MG_HDR_MAX bytes): what
 * mg_opinfo[h->opcode] asks for. Payload, pad and ICRC are the caller's. Returns bytes written.
 */
size_t mg_hdrs_build(const struct mg_hdrs *h, uint8_t *out);

/* RNR timer field (5 bits) <-> ns (IBA table 45), and local ACK timeout: 4.096 us * 2^t. */
uint64_t mg_rnr_timer_ns(unsigned field);
unsigned mg_rnr_timer_field(uint64_t ns); /* the shortest field >= ns */

/* ---- ICRC (IBA 7.8.1, RoCEv2 annex A17.3.3) ---------------------------------------------- */

/* What of the IP and UDP headers the ICRC covers. Addresses are GIDs: IPv4 as ::ffff:a.b.c.d. */
struct mg_flow {
	uint8_t src[16], dst[16];
	uint16_t sport, dport; /* host order */
	uint16_t ip_id;	       /* IPv4 only, host order */
	bool df;	       /* IPv4 only: the don't-fragment flag */
};

static inline bool mg_gid_is_v4(const uint8_t gid[16])
{
	static const uint8_t prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
	return __builtin_memcmp(gid, prefix, 12) == 0;
}

/*
 * ICRC of a packet given in pieces: `iov` covers the UDP payload from BTH up to (not with) the
 * ICRC; total length in bytes `len` is the sum of the pieces. BTH byte 4 is masked by the
 * function; the first piece must hold at least the whole BTH. Returns the value to be stored
 * little-endian at the packet's end.
 */
uint32_t mg_icrc(const struct mg_flow *flow, const struct iovec *iov, int n_iov, size_t len);

/*
 * Verify a received UDP payload (`len` bytes, ICRC last). `flow->ip_id` is the expected id.
 * IPv4's real id is not visible to a UDP socket, so any id is accepted: the difference of the
 * CRCs must lie in the 16-dimensional image of the id bits. On success *ip_id (if not NULL) is
 * the id found. Returns true when the packet is intact.
 */
bool mg_icrc_check(const struct mg_flow *flow, const uint8_t *buf, size_t len, uint16_t *ip_id);

#endif
