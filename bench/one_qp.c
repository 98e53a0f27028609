/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * one_qp [DEVICE] - how much memory a process has with one connected QP that has been used.
 *
 * Without DEVICE it does everything but RDMA, so the difference is what the device's library adds. The
 * QP is connected to itself. Prints one line of JSON with the resident size from /proc/self/smaps_rollup.
 */
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SIZE 65536u
#define MESSAGES 2000u

static char buffer[2 * SIZE];

static void die(const char *what)
{
	fprintf(stderr, "one_qp: %s: %s\n", what, strerror(errno));
	exit(2);
}

static long resident_kib(const char *field)
{
	FILE *f = fopen("/proc/self/smaps_rollup", "r");
	char line[256];
	long value = -1;
	size_t n = strlen(field);

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, field, n))
			value = atol(line + n);
	if (f)
		fclose(f);
	return value;
}

static struct ibv_context *open_device(const char *name)
{
	struct ibv_device **list = ibv_get_device_list(NULL);

	for (int i = 0; list && list[i]; i++)
		if (!strcmp(ibv_get_device_name(list[i]), name))
			return ibv_open_device(list[i]);
	return NULL;
}

static void connect_to_itself(struct ibv_qp *qp, const union ibv_gid *gid)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_INIT,
		.port_num = 1,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
	};

	if (ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS))
		die("INIT");
	attr = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = qp->qp_num,
		.max_dest_rd_atomic = 1,
		.min_rnr_timer = 12,
		.ah_attr = {.is_global = 1,
			    .port_num = 1,
			    .grh = {.dgid = *gid, .hop_limit = 1, .sgid_index = 1}},
	};
	if (ibv_modify_qp(qp, &attr,
			  IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER))
		die("RTR");
	attr = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1};
	if (ibv_modify_qp(qp, &attr,
			  IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
				  IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC))
		die("RTS");
}

static void use(const char *device)
{
	struct ibv_context *ctx = open_device(device);
	struct ibv_pd *pd = ctx ? ibv_alloc_pd(ctx) : NULL;
	struct ibv_cq *cq = pd ? ibv_create_cq(ctx, 16, NULL, NULL, 0) : NULL;
	struct ibv_mr *mr =
		cq ? ibv_reg_mr(pd, buffer, sizeof(buffer), IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE)
		   : NULL;
	struct ibv_qp_init_attr attr = {
		.qp_type = IBV_QPT_RC,
		.send_cq = cq,
		.recv_cq = cq,
		.cap = {.max_send_wr = 16, .max_recv_wr = 16, .max_send_sge = 1, .max_recv_sge = 1},
	};
	struct ibv_qp *qp = mr ? ibv_create_qp(pd, &attr) : NULL;
	union ibv_gid gid;

	if (!qp || ibv_query_gid(ctx, 1, 1, &gid))
		die(device);
	connect_to_itself(qp, &gid);
	for (unsigned i = 0; i < MESSAGES; i++) {
		struct ibv_sge sge = {.addr = (uintptr_t)buffer, .length = SIZE, .lkey = mr->lkey};
		struct ibv_send_wr *bad, wr = {.opcode = IBV_WR_RDMA_WRITE,
					       .send_flags = IBV_SEND_SIGNALED,
					       .sg_list = &sge,
					       .num_sge = 1};
		struct ibv_wc wc;
		int n;

		wr.wr.rdma.remote_addr = (uintptr_t)buffer + SIZE;
		wr.wr.rdma.rkey = mr->rkey;
		if (ibv_post_send(qp, &wr, &bad))
			die("ibv_post_send");
		while ((n = ibv_poll_cq(cq, 1, &wc)) == 0)
			;
		if (n < 0 || wc.status != IBV_WC_SUCCESS)
			die("completion");
	}
}

int main(int argc, char **argv)
{
	memset(buffer, 1, sizeof(buffer));
	if (argc > 1)
		use(argv[1]);
	printf("{\"rss_kib\": %ld, \"pss_kib\": %ld, \"private_kib\": %ld}\n", resident_kib("Rss:"),
	       resident_kib("Pss:"), resident_kib("Private_Clean:") + resident_kib("Private_Dirty:"));
	return 0;
}
