/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * mad.h - communication management datagrams (IBA vol. 1, 12.6) and the RDMA IP CM service (annex A11).
 *
 * Pure functions over byte buffers. One flat structure holds what any of the messages can carry; which
 * fields count is told by `attr`. Reserved bits are written as zero and ignored when read, but those
 * behind REQ's flow labels, which the kernel's cm does not clear (kept for exact encoding).
 */
#ifndef MG_CM_MAD_H
#define MG_CM_MAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MG_MAD_LEN 256u
#define MG_CM_PRIVATE_MAX 224u /* the longest private data of all messages: RTU's and DREP's */

enum mg_cm_attr {
	MG_CM_REQ = 0x10,
	MG_CM_MRA = 0x11,
	MG_CM_REJ = 0x12,
	MG_CM_REP = 0x13,
	MG_CM_RTU = 0x14,
	MG_CM_DREQ = 0x15,
	MG_CM_DREP = 0x16,
	MG_CM_SIDR_REQ = 0x17,
	MG_CM_SIDR_REP = 0x18,
	MG_CM_LAP = 0x19,
	MG_CM_APR = 0x1a,
};

/* REJ reasons (IBA table 112) that we send or look at. */
enum mg_cm_rej {
	MG_REJ_TIMEOUT = 4,
	MG_REJ_UNSUPPORTED = 5,
	MG_REJ_INVALID_ID = 6,
	MG_REJ_INVALID_SERVICE = 8,
	MG_REJ_STALE = 10,
	MG_REJ_CONSUMER = 28,
	MG_REJ_VENDOR_OPTION = 35,
};

/* What MRA and REJ are about: message MRAed / rejected (IBA tables 106, 108). */
enum mg_cm_about { MG_ABOUT_REQ = 0, MG_ABOUT_REP = 1, MG_ABOUT_OTHER = 2 };

/* A path of a REQ: 44 bytes of the message. */
struct mg_cm_route {
	uint16_t local_lid, remote_lid;
	uint8_t local_gid[16], remote_gid[16];
	uint32_t flow_label; /* 20 bits */
	uint8_t flow_rsv;    /* the 6 bits behind it */
	uint8_t rate;	     /* 6 bits, IBA's static rate code */
	uint8_t tclass, hop_limit;
	uint8_t sl;	     /* 4 bits */
	bool subnet_local;   /* 1 bit */
	uint8_t ack_timeout; /* 5 bits: 4.096 us * 2^n */
};

struct mg_cm_msg {
	uint16_t attr; /* enum mg_cm_attr */
	uint64_t tid;
	uint32_t local_id;  /* of the sender; SIDR: the request's id */
	uint32_t remote_id; /* all but REQ and SIDR */

	uint64_t service_id; /* REQ, SIDR_REQ, SIDR_REP */
	uint64_t ca_guid;    /* REQ, REP */
	uint32_t qkey, qpn;  /* REQ, REP, SIDR_REP; DREQ: the receiver's QPN */
	uint32_t eecn, remote_eecn, psn;
	uint8_t responder_resources, initiator_depth;
	uint8_t remote_timeout, local_timeout; /* REQ: CM response timeouts, 4.096 us * 2^n */
	uint8_t service_type;		       /* REQ: 0 RC, 1 UC, 2 RD, 3 extended */
	uint8_t extended_type;		       /* REQ: 1 XRC where service_type is 3 */
	bool flow_control, srq, rdc_exists;
	uint8_t retry_count, rnr_retry_count;
	uint16_t pkey;
	uint8_t path_mtu; /* enum ibv_mtu */
	uint8_t max_cm_retries;
	struct mg_cm_route primary, alternate;
	uint8_t target_ack_delay, failover_accepted; /* REP */

	uint8_t about;		 /* MRA, REJ: enum mg_cm_about */
	uint8_t service_timeout; /* MRA: 4.096 us * 2^n */
	uint16_t reason;	 /* REJ */
	uint8_t status;		 /* SIDR_REP */
	uint8_t info_len;	 /* REJ, SIDR_REP: of `info` */
	uint8_t info[72];

	uint8_t private_data[MG_CM_PRIVATE_MAX]; /* mg_cm_private_len(attr) bytes */
};

/* Bytes of private data that a message carries; 0 for an attribute not known. */
size_t mg_cm_private_len(uint16_t attr);

/*
 * Decode a MAD (`len` bytes). 0, or -EBADMSG: not 256 bytes, not a Send() of the CM class, or an
 * attribute other than those above up to SIDR_REP. (LAP and APR, alternate paths, are not spoken.)
 */
int mg_cm_parse(const uint8_t *mad, size_t len, struct mg_cm_msg *m);
/* Encode; attr must be one that mg_cm_parse takes. */
void mg_cm_build(const struct mg_cm_msg *m, uint8_t mad[MG_MAD_LEN]);

/* ---- RDMA IP CM service (annex A11) ------------------------------------------------------------- */

#define MG_IP_PREFIX_TCP 0x0000000001060000ull
#define MG_IP_PREFIX_UDP 0x0000000001110000ull
#define MG_IP_PREFIX_IB 0x00000000013f0000ull
#define MG_IP_HDR_LEN 36u

/* The header in front of the private data of REQ and SIDR_REQ: the addresses that the program uses. */
struct mg_ip_hdr {
	uint8_t version;	  /* 4 or 6 */
	uint16_t sport;		  /* host order */
	uint8_t src[16], dst[16]; /* GIDs: IPv4 as ::ffff:a.b.c.d */
};

/* -EBADMSG: another version of the header or of IP. */
int mg_ip_hdr_parse(const uint8_t *p, struct mg_ip_hdr *h);
void mg_ip_hdr_build(const struct mg_ip_hdr *h, uint8_t *p);

#endif
