/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * opcodes.c - what each BTH opcode carries (IBA tables 38 and 39, docs/protocol.md).
 */
#include "wire/wire.h"

#define HDR_LEN(m)                                                                                    \
	(MG_BTH_LEN + ((m)&MG_H_DETH ? 8 : 0) + ((m)&MG_H_XRCETH ? 4 : 0) + ((m)&MG_H_FETH ? 4 : 0) + \
	 ((m)&MG_H_RETH ? 16 : 0) + ((m)&MG_H_ATOMIC ? 28 : 0) + ((m)&MG_H_AETH ? 4 : 0) +            \
	 ((m)&MG_H_ATOMICACK ? 8 : 0) + ((m)&MG_H_IMM ? 4 : 0) + ((m)&MG_H_IETH ? 4 : 0) +            \
	 ((m)&MG_H_MEH ? MG_MEH_LEN : 0))

#define OP(opcode, text, bits) [opcode] = {.name = (text), .mask = (bits), .hdr_len = HDR_LEN(bits)}

/* A request that carries data; one that is a whole message without any. */
#define DATA (MG_P_REQUEST | MG_H_PAYLOAD)
#define QUERY (MG_P_REQUEST | MG_P_ONLY | MG_P_ANSWERED)

/* SEND and WRITE as RC, UC and XRC share them. `x` are the headers every request of the service has. */
#define SEND_WRITE(svc, n, x)                                                                             \
	OP((svc) + MG_OP_SEND_FIRST, n " SEND_FIRST", (x) | DATA | MG_P_SEND | MG_P_FIRST),               \
		OP((svc) + MG_OP_SEND_MIDDLE, n " SEND_MIDDLE", (x) | DATA | MG_P_SEND | MG_P_MIDDLE),    \
		OP((svc) + MG_OP_SEND_LAST, n " SEND_LAST", (x) | DATA | MG_P_SEND | MG_P_LAST),          \
		OP((svc) + MG_OP_SEND_LAST_IMM, n " SEND_LAST_IMM",                                       \
		   (x) | DATA | MG_P_SEND | MG_P_LAST | MG_H_IMM),                                        \
		OP((svc) + MG_OP_SEND_ONLY, n " SEND_ONLY", (x) | DATA | MG_P_SEND | MG_P_ONLY),          \
		OP((svc) + MG_OP_SEND_ONLY_IMM, n " SEND_ONLY_IMM",                                       \
		   (x) | DATA | MG_P_SEND | MG_P_ONLY | MG_H_IMM),                                        \
		OP((svc) + MG_OP_WRITE_FIRST, n " WRITE_FIRST",                                           \
		   (x) | DATA | MG_P_WRITE | MG_P_FIRST | MG_H_RETH),                                     \
		OP((svc) + MG_OP_WRITE_MIDDLE, n " WRITE_MIDDLE", (x) | DATA | MG_P_WRITE | MG_P_MIDDLE), \
		OP((svc) + MG_OP_WRITE_LAST, n " WRITE_LAST", (x) | DATA | MG_P_WRITE | MG_P_LAST),       \
		OP((svc) + MG_OP_WRITE_LAST_IMM, n " WRITE_LAST_IMM",                                     \
		   (x) | DATA | MG_P_WRITE | MG_P_LAST | MG_H_IMM),                                       \
		OP((svc) + MG_OP_WRITE_ONLY, n " WRITE_ONLY",                                             \
		   (x) | DATA | MG_P_WRITE | MG_P_ONLY | MG_H_RETH),                                      \
		OP((svc) + MG_OP_WRITE_ONLY_IMM, n " WRITE_ONLY_IMM",                                     \
		   (x) | DATA | MG_P_WRITE | MG_P_ONLY | MG_H_RETH | MG_H_IMM)

/* What only the acknowledged services, RC and XRC, have. Responses carry no XRCETH. */
#define READ_ATOMIC_ACK(svc, n, x)                                                                    \
	OP((svc) + MG_OP_READ_REQ, n " READ_REQ", (x) | QUERY | MG_P_READ | MG_H_RETH),               \
		OP((svc) + MG_OP_READ_RESP_FIRST, n " READ_RESP_FIRST",                               \
		   MG_H_PAYLOAD | MG_P_READ | MG_P_FIRST | MG_H_AETH),                                \
		OP((svc) + MG_OP_READ_RESP_MIDDLE, n " READ_RESP_MIDDLE",                             \
		   MG_H_PAYLOAD | MG_P_READ | MG_P_MIDDLE),                                           \
		OP((svc) + MG_OP_READ_RESP_LAST, n " READ_RESP_LAST",                                 \
		   MG_H_PAYLOAD | MG_P_READ | MG_P_LAST | MG_H_AETH),                                 \
		OP((svc) + MG_OP_READ_RESP_ONLY, n " READ_RESP_ONLY",                                 \
		   MG_H_PAYLOAD | MG_P_READ | MG_P_ONLY | MG_H_AETH),                                 \
		OP((svc) + MG_OP_ACK, n " ACK", MG_P_ONLY | MG_H_AETH),                               \
		OP((svc) + MG_OP_ATOMIC_ACK, n " ATOMIC_ACK",                                         \
		   MG_P_ONLY | MG_P_ATOMIC | MG_H_AETH | MG_H_ATOMICACK),                             \
		OP((svc) + MG_OP_CMP_SWAP, n " CMP_SWAP", (x) | QUERY | MG_P_ATOMIC | MG_H_ATOMIC),   \
		OP((svc) + MG_OP_FETCH_ADD, n " FETCH_ADD", (x) | QUERY | MG_P_ATOMIC | MG_H_ATOMIC), \
		OP((svc) + MG_OP_SEND_LAST_INV, n " SEND_LAST_INV",                                   \
		   (x) | DATA | MG_P_SEND | MG_P_LAST | MG_H_IETH),                                   \
		OP((svc) + MG_OP_SEND_ONLY_INV, n " SEND_ONLY_INV",                                   \
		   (x) | DATA | MG_P_SEND | MG_P_ONLY | MG_H_IETH),                                   \
		OP((svc) + MG_OP_FLUSH, n " FLUSH", (x) | QUERY | MG_H_FETH | MG_H_RETH),             \
		OP((svc) + MG_OP_ATOMIC_WRITE, n " ATOMIC_WRITE", (x) | QUERY | MG_H_PAYLOAD | MG_H_RETH)

const struct mg_opinfo mg_opinfo[256] = {
	SEND_WRITE(MG_SVC_RC, "RC", 0),
	READ_ATOMIC_ACK(MG_SVC_RC, "RC", 0),

	SEND_WRITE(MG_SVC_UC, "UC", 0),

	OP(MG_SVC_UD + MG_OP_SEND_ONLY, "UD SEND_ONLY", DATA | MG_P_SEND | MG_P_ONLY | MG_H_DETH),
	OP(MG_SVC_UD + MG_OP_SEND_ONLY_IMM, "UD SEND_ONLY_IMM",
	   DATA | MG_P_SEND | MG_P_ONLY | MG_H_DETH | MG_H_IMM),

	SEND_WRITE(MG_SVC_XRC, "XRC", MG_H_XRCETH),
	READ_ATOMIC_ACK(MG_SVC_XRC, "XRC", MG_H_XRCETH),

	OP(MG_OP_RESUME, "MIG RESUME", MG_P_CONTROL | MG_H_MEH),
	OP(MG_OP_RESUME_ACK, "MIG RESUME_ACK", MG_P_CONTROL | MG_H_MEH),
	OP(MG_OP_TOKEN, "MIG TOKEN", MG_P_CONTROL | MG_H_MEH),
	OP(MG_OP_TOKEN_ACK, "MIG TOKEN_ACK", MG_P_CONTROL | MG_H_MEH),
};
