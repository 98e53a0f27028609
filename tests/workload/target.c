// SPDX-License-Identifier: BSD-3-Clause
/*
 * target - a QP to forge packets at, and what becomes of it.
 *
 *	target -x GID-INDEX [-d DEVICE] [-p PORT]
 *
 * A plain program for any RDMA device. Takes one TCP connection after the other, and on it commands, a line
 * each, answered by a line of JSON:
 *
 *	open TYPE GID QPN RQ-PSN SQ-PSN    a fresh QP (rc, uc, ud) in RTS, its peer as named: {"qpn", "rkey",
 *	                                   "va": of MEMORY bytes that may be read and written, "closed_rkey",
 *	                                   "closed_va": of as many that may not}; RECEIVES receives are posted
 *	post send|write|read|atomic        one request of 64 bytes (8) to peer's address 0x1000, key 0x42
 *	report                             {"state", "completions": [...], "changed": [[offset, length], ...],
 *	                                   "closed": true|false whether the closed memory has changed, "read":
 *	                                   whether something was read into the requester's buffer}
 *
 * A connection's end is the QP's. Exit status 1 when the test itself could not be made.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MEMORY 8192u
#define RECEIVES 3u
#define RECEIVE 2048u		     /* bytes each */
#define ANSWERS (RECEIVES * RECEIVE) /* where requests read to, behind the receives */
#define QKEY 0x11111111u
#define BLANK 0xee
#define ALL                                                                                    \
	((unsigned)IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | \
	 IBV_ACCESS_REMOTE_ATOMIC)

static struct {
	struct ibv_context *ctx;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_mr *open, *closed, *own; /* own: receives, then what requests read into */
	struct ibv_qp *qp;
	uint8_t gid_index;
} my;

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "target: %s: %s\n", what, strerror(errno));
	exit(1);
}

static struct ibv_mr *memory(size_t size, unsigned access)
{
	void *at = NULL;
	struct ibv_mr *mr = NULL;

	if (!posix_memalign(&at, 4096, size))
		mr = ibv_reg_mr(my.pd, at, size, (int)access);
	if (!mr)
		die("memory");
	memset(at, BLANK, size);
	return mr;
}

static void modify(struct ibv_qp_attr *attr, int mask)
{
	if ((errno = ibv_modify_qp(my.qp, attr, mask | IBV_QP_STATE)))
		die("ibv_modify_qp");
}

static void connect_to(enum ibv_qp_type type, const union ibv_gid *peer, uint32_t qpn, uint32_t rq_psn,
		       uint32_t sq_psn)
{
	struct ibv_qp_attr init = {
		.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = ALL, .qkey = QKEY};
	struct ibv_qp_attr rtr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = qpn,
		.rq_psn = rq_psn,
		.max_dest_rd_atomic = 4,
		.min_rnr_timer = 12,
		.ah_attr = {.is_global = 1,
			    .port_num = 1,
			    .grh = {.dgid = *peer, .sgid_index = my.gid_index, .hop_limit = 64}}};
	struct ibv_qp_attr rts = {.qp_state = IBV_QPS_RTS,
				  .sq_psn = sq_psn,
				  .timeout = 0, /* none: what is asked waits for what is forged */
				  .retry_cnt = 7,
				  .rnr_retry = 7,
				  .max_rd_atomic = 4};

	modify(&init,
	       IBV_QP_PKEY_INDEX | IBV_QP_PORT | (type == IBV_QPT_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS));
	if (type == IBV_QPT_UD) {
		modify(&rtr, 0);
		modify(&rts, IBV_QP_SQ_PSN);
		return;
	}
	modify(&rtr, IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			     (type == IBV_QPT_RC ? IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER : 0));
	modify(&rts, IBV_QP_SQ_PSN | (type == IBV_QPT_RC ? IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
								   IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC
							 : 0));
}

static void open_qp(FILE *out, char *args)
{
	struct ibv_qp_init_attr init = {.cap = {8, RECEIVES, 1, 1, 0}, .sq_sig_all = 1};
	char type[3], name[33];
	unsigned qpn, rq_psn, sq_psn;
	union ibv_gid peer;

	if (sscanf(args, "%2s %32s %u %u %u", type, name, &qpn, &rq_psn, &sq_psn) != 5 || my.qp)
		die("open");
	for (int i = 0; i < 16; i++)
		if (sscanf(name + 2 * i, "%2hhx", &peer.raw[i]) != 1)
			die("a GID");
	my.open = memory(MEMORY, ALL);
	my.closed = memory(MEMORY, IBV_ACCESS_LOCAL_WRITE);
	my.own = memory(MEMORY, IBV_ACCESS_LOCAL_WRITE);
	my.cq = ibv_create_cq(my.ctx, 64, NULL, NULL, 0);
	if (!my.cq)
		die("ibv_create_cq");
	init.send_cq = init.recv_cq = my.cq;
	init.qp_type = type[0] == 'r' ? IBV_QPT_RC : type[1] == 'c' ? IBV_QPT_UC : IBV_QPT_UD;
	my.qp = ibv_create_qp(my.pd, &init);
	if (!my.qp)
		die("ibv_create_qp");
	connect_to(init.qp_type, &peer, qpn, rq_psn, sq_psn);
	for (uint32_t i = 0; i < RECEIVES; i++) {
		struct ibv_sge sge = {(uintptr_t)my.own->addr + (size_t)RECEIVE * i, RECEIVE, my.own->lkey};
		struct ibv_recv_wr wr = {.wr_id = i, .sg_list = &sge, .num_sge = 1}, *bad;

		if ((errno = ibv_post_recv(my.qp, &wr, &bad)))
			die("ibv_post_recv");
	}
	fprintf(out, "{\"qpn\": %u, \"rkey\": %u, \"va\": %llu, \"closed_rkey\": %u, \"closed_va\": %llu}\n",
		my.qp->qp_num, my.open->rkey, (unsigned long long)(uintptr_t)my.open->addr, my.closed->rkey,
		(unsigned long long)(uintptr_t)my.closed->addr);
}

static void close_qp(void)
{
	struct ibv_mr **const regions[] = {&my.open, &my.closed, &my.own};

	if (!my.qp)
		return;
	if (ibv_destroy_qp(my.qp) || ibv_destroy_cq(my.cq))
		die("ibv_destroy");
	my.qp = NULL;
	for (int i = 0; i < 3; i++) {
		void *at = (*regions[i])->addr;

		if (ibv_dereg_mr(*regions[i]))
			die("ibv_dereg_mr");
		free(at);
	}
}

static void post(FILE *out, const char *what)
{
	bool atomic = what[0] == 'a';
	struct ibv_sge sge = {(uintptr_t)my.own->addr + ANSWERS, atomic ? 8 : 64, my.own->lkey};
	struct ibv_send_wr wr = {.wr_id = 100, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND}, *bad;

	if (atomic) {
		wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
		wr.wr.atomic.remote_addr = 0x1000;
		wr.wr.atomic.rkey = 0x42;
		wr.wr.atomic.compare_add = 1;
	} else if (what[0] != 's') {
		wr.opcode = what[0] == 'r' ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
		wr.wr.rdma.remote_addr = 0x1000;
		wr.wr.rdma.rkey = 0x42;
	}
	if ((errno = ibv_post_send(my.qp, &wr, &bad)))
		die("ibv_post_send");
	fprintf(out, "{}\n");
}

static const char *status_name(enum ibv_wc_status status)
{
	static const char *const names[] = {
		[IBV_WC_SUCCESS] = "SUCCESS",
		[IBV_WC_LOC_LEN_ERR] = "LOC_LEN_ERR",
		[IBV_WC_LOC_QP_OP_ERR] = "LOC_QP_OP_ERR",
		[IBV_WC_LOC_PROT_ERR] = "LOC_PROT_ERR",
		[IBV_WC_WR_FLUSH_ERR] = "WR_FLUSH_ERR",
		[IBV_WC_LOC_ACCESS_ERR] = "LOC_ACCESS_ERR",
		[IBV_WC_REM_INV_REQ_ERR] = "REM_INV_REQ_ERR",
		[IBV_WC_REM_ACCESS_ERR] = "REM_ACCESS_ERR",
		[IBV_WC_REM_OP_ERR] = "REM_OP_ERR",
		[IBV_WC_BAD_RESP_ERR] = "BAD_RESP_ERR",
		[IBV_WC_RETRY_EXC_ERR] = "RETRY_EXC_ERR",
	};
	bool known = (unsigned)status < sizeof(names) / sizeof(names[0]) && names[status];

	return known ? names[status] : ibv_wc_status_str(status);
}

static bool is_blank(const uint8_t *at, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (at[i] != BLANK)
			return false;
	return true;
}

static void report(FILE *out)
{
	static const char *const states[] = {"RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR"};
	struct ibv_qp_init_attr init;
	const uint8_t *at = my.open->addr;
	const char *comma = "";
	struct ibv_qp_attr attr;
	struct ibv_wc wc;
	int n;

	if ((errno = ibv_query_qp(my.qp, &attr, IBV_QP_STATE, &init)))
		die("ibv_query_qp");
	fprintf(out, "{\"state\": \"%s\", \"completions\": [",
		attr.qp_state < 7 ? states[attr.qp_state] : "?");
	while ((n = ibv_poll_cq(my.cq, 1, &wc)) > 0) {
		fprintf(out, "%s\"%s %s", comma, wc.wr_id >= 100 ? "send" : "recv", status_name(wc.status));
		if (wc.wr_id < 100 && wc.status == IBV_WC_SUCCESS)
			fprintf(out, " %u", wc.byte_len);
		fputc('"', out);
		comma = ", ";
	}
	if (n < 0)
		die("ibv_poll_cq");
	fprintf(out, "], \"changed\": [");
	comma = "";
	for (uint32_t i = 0; i < MEMORY;) {
		uint32_t from = i;

		while (i < MEMORY && at[i] != BLANK)
			i++;
		if (i > from) {
			fprintf(out, "%s[%u, %u]", comma, from, i - from);
			comma = ", ";
		} else {
			i++;
		}
	}
	fprintf(out, "], \"closed\": %s, \"read\": %s}\n",
		is_blank(my.closed->addr, MEMORY) ? "false" : "true",
		is_blank((uint8_t *)my.own->addr + ANSWERS, 64) ? "false" : "true");
}

static void serve(int fd)
{
	FILE *in = fdopen(fd, "r"), *out = fdopen(dup(fd), "w");
	char line[256];

	if (!in || !out)
		die("fdopen");
	while (fgets(line, sizeof(line), in)) {
		if (!strncmp(line, "open ", 5))
			open_qp(out, line + 5);
		else if (!strncmp(line, "post ", 5) && my.qp)
			post(out, line + 5);
		else if (!strncmp(line, "report", 6) && my.qp)
			report(out);
		else
			die(line);
		fflush(out);
	}
	close_qp();
	fclose(in);
	fclose(out);
}

static void open_device(const char *name)
{
	struct ibv_device **list = ibv_get_device_list(NULL);

	for (int i = 0; list && list[i] && !my.ctx; i++)
		if (!name || !strcmp(name, ibv_get_device_name(list[i])))
			my.ctx = ibv_open_device(list[i]);
	if (!my.ctx || !(my.pd = ibv_alloc_pd(my.ctx)))
		die("no RDMA device");
	ibv_free_device_list(list);
}

int main(int argc, char **argv)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(18700)};
	int listening = socket(AF_INET, SOCK_STREAM, 0), on = 1, fd, c;
	const char *device = NULL;

	while ((c = getopt(argc, argv, "d:x:p:")) > 0) {
		if (c == 'd')
			device = optarg;
		else if (c == 'x')
			my.gid_index = (uint8_t)atoi(optarg);
		else if (c == 'p')
			sin.sin_port = htons((uint16_t)atoi(optarg));
		else
			return 1;
	}
	open_device(device);
	setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listening, (struct sockaddr *)&sin, sizeof(sin)) || listen(listening, 8))
		die("listen");
	while ((fd = accept(listening, NULL, NULL)) >= 0)
		serve(fd);
	die("accept");
}
