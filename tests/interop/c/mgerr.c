// SPDX-License-Identifier: BSD-3-Clause
/*
 * mgerr - what becomes of one request that the responder refuses, or cannot take yet.
 *
 *   mgerr -x GID-INDEX SCENARIO            the responder
 *   mgerr -x GID-INDEX SCENARIO SERVER     the requester: posts the request and one SEND behind it
 *
 * A plain program for any RDMA device. Each side prints, one a line, how its work requests completed;
 * mgerr -l lists the scenarios. Exit status 1 when the test itself could not be made.
 */
#include <errno.h>
#include <infiniband/verbs.h>
#include <netdb.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PORT "18600"
#define SIZE 8192u
#define ALL                                                                                    \
	((unsigned)IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | \
	 IBV_ACCESS_REMOTE_ATOMIC)

enum receives { GOOD, NONE, LATE, SHORT, BAD_KEY };

struct scenario {
	const char *name;
	enum ibv_wr_opcode opcode;
	uint32_t length, rkey_xor;
	uint64_t offset;
	enum receives receives;
	uint8_t rnr_retries;	     /* 0: for ever */
	bool gone;		     /* the responder's QP is destroyed first */
	unsigned mr_lacks, qp_lacks; /* of ALL the access flags, at the responder */
};

static const struct scenario scenarios[] = {
	{"send", IBV_WR_SEND, 3000},
	{"send_empty", IBV_WR_SEND, 0},
	{"send_imm", IBV_WR_SEND_WITH_IMM, 3000},
	{"write_empty", IBV_WR_RDMA_WRITE, 0},
	{"write_imm", IBV_WR_RDMA_WRITE_WITH_IMM, 3000},
	{"write_imm_empty", IBV_WR_RDMA_WRITE_WITH_IMM, 0},
	{"read_empty", IBV_WR_RDMA_READ, 0},
	{"write_bad_rkey", IBV_WR_RDMA_WRITE, 64, .rkey_xor = 0xff00},
	{"write_out_of_bounds", IBV_WR_RDMA_WRITE, 3000, .offset = SIZE - 2999},
	{"write_no_access_mr", IBV_WR_RDMA_WRITE, 64, .mr_lacks = ALL & ~(unsigned)IBV_ACCESS_LOCAL_WRITE},
	{"write_no_access_qp", IBV_WR_RDMA_WRITE, 64, .qp_lacks = ALL & ~(unsigned)IBV_ACCESS_REMOTE_READ},
	{"read_bad_rkey", IBV_WR_RDMA_READ, 64, .rkey_xor = 0xff00},
	{"read_out_of_bounds", IBV_WR_RDMA_READ, 3000, .offset = SIZE - 2999},
	{"read_no_access_mr", IBV_WR_RDMA_READ, 64, .mr_lacks = ALL & ~(unsigned)IBV_ACCESS_LOCAL_WRITE},
	{"read_no_access_qp", IBV_WR_RDMA_READ, 64, .qp_lacks = ALL & ~(unsigned)IBV_ACCESS_REMOTE_WRITE},
	{"send_too_long", IBV_WR_SEND, 3000, .receives = SHORT},
	{"send_into_bad_lkey", IBV_WR_SEND, 3000, .receives = BAD_KEY},
	{"rnr_then_receive", IBV_WR_SEND, 3000, .receives = LATE},
	{"rnr_write_imm_then_receive", IBV_WR_RDMA_WRITE_WITH_IMM, 3000, .receives = LATE},
	{"rnr_retries_exceeded", IBV_WR_SEND, 3000, .receives = NONE, .rnr_retries = 2},
	{"retries_exceeded_send", IBV_WR_SEND, 3000, .gone = true},
	{"retries_exceeded_write", IBV_WR_RDMA_WRITE, 3000, .gone = true},
	{"retries_exceeded_read", IBV_WR_RDMA_READ, 3000, .gone = true},
};

static void die(const char *what)
{
	fprintf(stderr, "mgerr: %s: %s\n", what, strerror(errno));
	exit(1);
}

static const char *status_name(enum ibv_wc_status status)
{
	static const char *const names[] = {
		[IBV_WC_SUCCESS] = "SUCCESS",
		[IBV_WC_LOC_LEN_ERR] = "LOC_LEN_ERR",
		[IBV_WC_LOC_QP_OP_ERR] = "LOC_QP_OP_ERR",
		[IBV_WC_LOC_PROT_ERR] = "LOC_PROT_ERR",
		[IBV_WC_WR_FLUSH_ERR] = "WR_FLUSH_ERR",
		[IBV_WC_REM_INV_REQ_ERR] = "REM_INV_REQ_ERR",
		[IBV_WC_REM_ACCESS_ERR] = "REM_ACCESS_ERR",
		[IBV_WC_REM_OP_ERR] = "REM_OP_ERR",
		[IBV_WC_RETRY_EXC_ERR] = "RETRY_EXC_ERR",
		[IBV_WC_RNR_RETRY_EXC_ERR] = "RNR_RETRY_EXC_ERR",
	};
	const char *name = (size_t)status < sizeof(names) / sizeof(names[0]) ? names[status] : NULL;

	return name ? name : ibv_wc_status_str(status);
}

/* --- the two ends' TCP connection ------------------------------------------------------------------- */

static int meet(const char *server)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = server ? 0 : AI_PASSIVE}, *found;
	int fd, one = 1, got;

	hints.ai_family = server ? AF_UNSPEC : AF_INET6; /* takes IPv4 too */
	if (getaddrinfo(server, PORT, &hints, &found))
		die("address");
	fd = socket(found->ai_family, SOCK_STREAM, 0);
	if (fd < 0)
		die("socket");
	if (server) {
		if (connect(fd, found->ai_addr, found->ai_addrlen))
			die("connect");
		freeaddrinfo(found);
		return fd;
	}
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, found->ai_addr, found->ai_addrlen) || listen(fd, 1))
		die("listen");
	freeaddrinfo(found);
	got = accept(fd, NULL, NULL);
	if (got < 0)
		die("accept");
	close(fd);
	return got;
}

static void trade(int fd, const void *mine, void *theirs, size_t len)
{
	if (write(fd, mine, len) != (ssize_t)len)
		die("the other side");
	for (size_t have = 0; have < len;) {
		ssize_t n = read(fd, (char *)theirs + have, len - have);

		if (n <= 0)
			die("the other side");
		have += (size_t)n;
	}
}

static void step(int fd) /* both have come so far */
{
	char mine = 's', theirs;

	trade(fd, &mine, &theirs, 1);
}

/* --- completions ------------------------------------------------------------------------------------------ */

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

static void report(struct ibv_cq *cq, const char *what, int count, uint64_t patience_ms)
{
	uint64_t end = now_ms() + patience_ms;
	struct ibv_wc wc;

	while (count > 0 && now_ms() < end) {
		int n = ibv_poll_cq(cq, 1, &wc);

		if (n < 0)
			die("ibv_poll_cq");
		if (!n) {
			usleep(1000);
			continue;
		}
		count--;
		printf("%s %s", what, status_name(wc.status));
		if (*what == 'r' && wc.status == IBV_WC_SUCCESS) {
			printf(" %u bytes", wc.byte_len);
			if (wc.wc_flags & IBV_WC_WITH_IMM)
				printf(" imm %08x", be32toh(wc.imm_data));
		}
		printf("\n");
	}
}

/* --- one run ---------------------------------------------------------------------------------------------- */

struct info {
	uint8_t gid[16];
	uint64_t addr;
	uint32_t qpn, psn, rkey, pad;
};

static void connect_qp(struct ibv_qp *qp, const struct scenario *s, int gid_index, const struct info *own,
		       const struct info *peer)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = peer->qpn,
		.rq_psn = peer->psn,
		.max_dest_rd_atomic = 4,
		.min_rnr_timer = 12, /* 0.64 ms */
		.ah_attr = {.is_global = 1, .port_num = 1},
	};

	memcpy(attr.ah_attr.grh.dgid.raw, peer->gid, 16);
	attr.ah_attr.grh.sgid_index = (uint8_t)gid_index;
	attr.ah_attr.grh.hop_limit = 64;
	errno = ibv_modify_qp(qp, &attr,
			      IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				      IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
	if (errno)
		die("RTR");
	memset(&attr, 0, sizeof(attr));
	attr.qp_state = IBV_QPS_RTS;
	attr.timeout = 15; /* 134 ms */
	attr.retry_cnt = 3;
	attr.rnr_retry = s->rnr_retries ? s->rnr_retries : 7;
	attr.sq_psn = own->psn;
	attr.max_rd_atomic = 4;
	errno = ibv_modify_qp(qp, &attr,
			      IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
				      IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
	if (errno)
		die("RTS");
}

static void post_receives(struct ibv_qp *qp, const struct ibv_mr *mr, enum receives how)
{
	for (uint64_t i = 0; i < 2; i++) {
		struct ibv_sge sge = {(uintptr_t)mr->addr, how == SHORT ? 2999 : SIZE / 2, mr->lkey};
		struct ibv_recv_wr wr = {.wr_id = i, .sg_list = &sge, .num_sge = 1}, *bad;

		if (how == BAD_KEY)
			sge.lkey ^= 0xff00;
		errno = ibv_post_recv(qp, &wr, &bad);
		if (errno)
			die("ibv_post_recv");
	}
}

static void request(struct ibv_qp *qp, const struct scenario *s, const struct ibv_mr *mr,
		    const struct info *peer)
{
	struct ibv_sge sge = {(uintptr_t)mr->addr, s->length, mr->lkey};
	struct ibv_send_wr last = {.wr_id = 1, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_SIGNALED}, *bad;
	struct ibv_send_wr first = {
		.wr_id = 0,
		.next = &last,
		.sg_list = &sge,
		.num_sge = s->length ? 1 : 0,
		.opcode = s->opcode,
		.send_flags = IBV_SEND_SIGNALED,
		.imm_data = htobe32(0x1234abcd),
	};

	first.wr.rdma.remote_addr = peer->addr + s->offset;
	first.wr.rdma.rkey = peer->rkey ^ s->rkey_xor;
	errno = ibv_post_send(qp, &first, &bad);
	if (errno)
		die("ibv_post_send");
}

static struct ibv_context *open_device(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_context *context = NULL;

	for (int i = 0; list && list[i] && !context; i++)
		if (!strcmp(ibv_get_device_name(list[i]), "rxe0"))
			context = ibv_open_device(list[i]);
	if (list)
		ibv_free_device_list(list);
	if (!context)
		die("rxe0");
	return context;
}

static void run(const struct scenario *s, int gid_index, const char *server)
{
	struct ibv_context *context = open_device();
	struct ibv_pd *pd = ibv_alloc_pd(context);
	struct ibv_cq *scq = ibv_create_cq(context, 16, NULL, NULL, 0);
	struct ibv_cq *rcq = ibv_create_cq(context, 16, NULL, NULL, 0);
	struct ibv_qp_init_attr init = {
		.send_cq = scq,
		.recv_cq = rcq,
		.qp_type = IBV_QPT_RC,
		.cap = {.max_send_wr = 8, .max_recv_wr = 8, .max_send_sge = 1, .max_recv_sge = 1},
	};
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
	struct ibv_qp *qp = ibv_create_qp(pd, &init);
	uint8_t *memory = calloc(1, SIZE);
	struct ibv_mr *mr = ibv_reg_mr(pd, memory, SIZE, (int)(server ? ALL : ALL & ~s->mr_lacks));
	struct info own = {0}, peer;
	union ibv_gid gid;
	int fd;

	if (!pd || !scq || !rcq || !qp || !mr || ibv_query_gid(context, 1, gid_index, &gid))
		die("device");
	attr.qp_access_flags = server ? ALL : ALL & ~s->qp_lacks;
	errno = ibv_modify_qp(qp, &attr,
			      IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
	if (errno)
		die("INIT");
	memcpy(own.gid, gid.raw, 16);
	own.qpn = qp->qp_num;
	own.psn = server ? 0xfffffe : 0x123456; /* across the end of the number space */
	own.rkey = mr->rkey;
	own.addr = (uintptr_t)memory;
	fd = meet(server);
	trade(fd, &own, &peer, sizeof(own));
	connect_qp(qp, s, gid_index, &own, &peer);
	if (!server && (s->receives == GOOD || s->receives == SHORT || s->receives == BAD_KEY))
		post_receives(qp, mr, s->receives);
	if (!server && s->gone && ibv_destroy_qp(qp))
		die("ibv_destroy_qp");
	step(fd); /* ready */
	if (server) {
		request(qp, s, mr, &peer);
		if (s->receives == LATE) {
			usleep(200000);
			step(fd); /* now receive */
		}
		report(scq, "send", 2, 60000);
	} else if (s->receives == LATE) {
		step(fd);
		post_receives(qp, mr, GOOD);
	}
	step(fd); /* the requester is done */
	if (!server && !s->gone)
		report(rcq, "recv", 2, 500);
	step(fd);
	close(fd);
}

int main(int argc, char **argv)
{
	int gid_index = 1, c;

	setvbuf(stdout, NULL, _IOLBF, 0);
	while ((c = getopt(argc, argv, "x:l")) != -1) {
		if (c == 'l') {
			for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]); i++)
				puts(scenarios[i].name);
			return 0;
		}
		gid_index = c == 'x' ? atoi(optarg) : -1;
	}
	for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]) && optind < argc; i++)
		if (!strcmp(argv[optind], scenarios[i].name)) {
			run(&scenarios[i], gid_index, argv[optind + 1]);
			return 0;
		}
	fprintf(stderr, "mgerr: which scenario? (-l lists them)\n");
	return 1;
}
