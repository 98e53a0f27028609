// SPDX-License-Identifier: BSD-3-Clause
/*
 * mgtool.c - the device without the verbs layer, driven by lines on stdin (tests/native/tool.py).
 *
 * One QP (or two), one CQ, one buffer. The first half of the buffer is sent from, the second received into.
 * While the tool waits for a line nobody polls: what happens then is the progress thread's doing.
 */
#include "net/net.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define HALF (8u << 20)
#define DEPTH 256u
#define POLL_SECONDS 90u /* under TSan beside others 5000 messages take half a minute */

static struct {
	struct mg_device *dev;
	struct mg_pd *pd;
	struct mg_mr *mr;
	struct mg_cq *cq;
	struct mg_qp *qp, *second;
	uint8_t *buf;
	uint32_t peer_rkey;
	uint64_t peer_addr;
	_Atomic unsigned events;
	_Atomic bool spin;
	pthread_t spinner;
} t;

static void die(const char *what, int err)
{
	printf("error %s: %s\n", what, strerror(err));
	fflush(stdout);
	exit(1);
}

static uint8_t pattern(uint32_t message, size_t at)
{
	return (uint8_t)(message * 31 + at * 7 + (at >> 8));
}

static void on_cq_event(struct mg_cq *cq)
{
	(void)cq;
	t.events++;
}

static void hex(const uint8_t *p, size_t n, char *out)
{
	for (size_t i = 0; i < n; i++)
		sprintf(out + 2 * i, "%02x", p[i]);
}

static bool unhex(const char *in, uint8_t *p, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		unsigned v;

		if (sscanf(in + 2 * i, "%2x", &v) != 1)
			return false;
		p[i] = (uint8_t)v;
	}
	return true;
}

static int create_qp(struct mg_qp **qp)
{
	struct ibv_qp_init_attr_ex init = {
		.qp_type = IBV_QPT_RC,
		.cap = {.max_send_wr = DEPTH, .max_recv_wr = DEPTH, .max_send_sge = 2, .max_recv_sge = 2},
		.sq_sig_all = 1,
	};
	struct mg_qp_parts parts = {.pd = t.pd, .send_cq = t.cq, .recv_cq = t.cq};

	return mg_qp_create(t.dev->engine, &parts, &init, NULL, qp);
}

/* A second QP: each send goes out on both. */
static void cmd_twin(void)
{
	int ret;

	mg_device_lock(t.dev);
	ret = create_qp(&t.second);
	mg_device_unlock(t.dev);
	if (ret)
		die("create", ret);
	printf("twin %u\n", mg_qp_num(t.second));
}

static void open_all(void)
{
	static const struct mg_device_hooks hooks = {.cq_event = on_cq_event};
	struct mg_port port;
	char gid[33];
	int ret;

	mg_device_set_hooks(&hooks);
	t.dev = mg_device_get();
	if (!t.dev)
		die("open", errno);
	t.buf = calloc(2, HALF);
	mg_device_lock(t.dev);
	t.pd = mg_pd_create(t.dev->engine);
	ret = mg_mr_create(t.pd, t.buf, 2 * HALF, (uintptr_t)t.buf,
			   IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ, &t.mr);
	if (!ret)
		ret = mg_cq_create(t.dev->engine, 4 * DEPTH, NULL, &t.cq);
	if (!ret)
		ret = create_qp(&t.qp);
	port = t.dev->port; /* its thread looks at the interface anew whenever that changes */
	mg_device_unlock(t.dev);
	if (ret)
		die("create", ret);
	hex(port.gid[1].gid, 16, gid);
	printf("ready %u %s %u %llu %s %u %u\n", mg_qp_num(t.qp), gid, mg_mr_rkey(t.mr),
	       (unsigned long long)(uintptr_t)t.buf, port.ifname, port.active_mtu, port.n_gid);
}

static void modify(struct mg_qp *qp, struct ibv_qp_attr *attr, int mask)
{
	int ret;

	mg_device_lock(t.dev);
	ret = mg_qp_modify(qp, mg_now(), attr, mask);
	mg_net_flush(t.dev, 0);
	mg_device_unlock(t.dev);
	if (ret)
		die("modify", ret);
}

static void cmd_connect(struct mg_qp *qp, const char *args)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT,
				.port_num = 1,
				.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ};
	unsigned qpn, rkey, psn, peer_psn, mtu, timeout;
	unsigned long long addr;
	char gid[33];

	if (sscanf(args, "%u %32s %u %llu %u %u %u %u", &qpn, gid, &rkey, &addr, &psn, &peer_psn, &mtu,
		   &timeout) != 8)
		die("connect", EINVAL);
	t.peer_rkey = rkey;
	t.peer_addr = addr;
	modify(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
	a = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTR,
				 .dest_qp_num = qpn,
				 .rq_psn = peer_psn,
				 .max_dest_rd_atomic = 16,
				 .min_rnr_timer = 12,
				 .path_mtu = IBV_MTU_256};
	while ((128u << a.path_mtu) < mtu)
		a.path_mtu++;
	a.ah_attr.is_global = 1;
	a.ah_attr.port_num = 1;
	a.ah_attr.grh.sgid_index = 1;
	a.ah_attr.grh.hop_limit = 64;
	if (!unhex(gid, a.ah_attr.grh.dgid.raw, 16))
		die("gid", EINVAL);
	modify(qp, &a,
	       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
		       IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
	a = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTS,
				 .sq_psn = psn,
				 .timeout = (uint8_t)timeout,
				 .retry_cnt = 7,
				 .rnr_retry = 7,
				 .max_rd_atomic = 16};
	modify(qp, &a,
	       IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
		       IBV_QP_MAX_QP_RD_ATOMIC);
	printf("connected\n");
}

static void post_send(enum ibv_wr_opcode op, uint32_t i, size_t size, size_t slot)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)t.buf + slot, .length = (uint32_t)size, .lkey = mg_mr_lkey(t.mr)};
	struct ibv_send_wr wr = {.wr_id = i, .sg_list = &sge, .num_sge = 1, .opcode = op}, *bad;
	int ret;

	if (op == IBV_WR_SEND)
		for (size_t k = 0; k < size; k++)
			t.buf[slot + k] = pattern(i, k);
	if (op == IBV_WR_RDMA_READ)
		sge.addr += HALF;
	wr.wr.rdma.remote_addr = t.peer_addr + slot + (op == IBV_WR_RDMA_WRITE ? HALF : 0);
	wr.wr.rdma.rkey = t.peer_rkey;
	ret = mg_post_send(t.qp, mg_now(), &wr, &bad);
	if (!ret && t.second) /* one flush for both: their packets may stand next to each other */
		ret = mg_post_send(t.second, mg_now(), &wr, &bad);
	mg_net_flush(t.dev, MG_TX_LAZY);
	if (ret)
		die("post_send", ret);
}

static void post_recv(uint32_t i, size_t size, size_t slot)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)t.buf + HALF + slot, .length = (uint32_t)size, .lkey = mg_mr_lkey(t.mr)};
	struct ibv_recv_wr wr = {.wr_id = i, .sg_list = &sge, .num_sge = 1}, *bad;
	int ret = mg_post_recv(t.qp, &wr, &bad);

	if (ret)
		die("post_recv", ret);
}

static void check(uint32_t i, size_t size, size_t slot)
{
	for (size_t k = 0; k < size; k++)
		if (t.buf[HALF + slot + k] != pattern(i, k)) {
			printf("error message %u of %zu bytes differs at byte %zu\n", i, size, k);
			exit(1);
		}
}

/* `n_send` requests out and `n_recv` messages in, at the same time. */
static void run(enum ibv_wr_opcode op, uint32_t n_send, uint32_t n_recv, size_t size)
{
	uint32_t depth = DEPTH, sent = 0, send_done = 0, twin_done = 0, posted = 0, recv_done = 0;
	mg_time end = mg_now() + POLL_SECONDS * 1000000000ull, begun = mg_now();

	if (size && HALF / size < depth)
		depth = (uint32_t)(HALF / size);
	if (!depth)
		die("size", EINVAL);
	while (send_done < n_send || (t.second && twin_done < n_send) || recv_done < n_recv) {
		struct ibv_wc wc[16];
		int n;

		mg_device_lock(t.dev);
		while (posted < n_recv && posted - recv_done < depth) {
			post_recv(posted, size, (posted % depth) * size);
			posted++;
		}
		while (sent < n_send && sent - send_done < depth && (!t.second || sent - twin_done < depth)) {
			post_send(op, sent, size, (sent % depth) * size);
			sent++;
		}
		n = mg_cq_poll(t.cq, 16, wc);
		if (!n) {
			mg_net_poll(t.dev);
			n = mg_cq_poll(t.cq, 16, wc);
		}
		mg_device_unlock(t.dev);
		for (int i = 0; i < n; i++) {
			if (wc[i].status != IBV_WC_SUCCESS) {
				printf("error completion status %d\n", wc[i].status);
				exit(1);
			}
			if (wc[i].opcode & IBV_WC_RECV) {
				if (wc[i].wr_id != recv_done || wc[i].byte_len != size)
					die("order", EPROTO);
				check(recv_done, size, (recv_done % depth) * size);
				recv_done++;
			} else {
				uint32_t *done = wc[i].qp_num == mg_qp_num(t.qp) ? &send_done : &twin_done;

				if (wc[i].wr_id != (*done)++)
					die("order", EPROTO);
			}
		}
		if (mg_now() > end) {
			printf("error timeout: %u of %u sent, %u of %u received\n", send_done, n_send,
			       recv_done, n_recv);
			exit(1);
		}
	}
	printf("done %u %u %llu\n", send_done, recv_done, (unsigned long long)(mg_now() - begun));
}

/* `n` WRITEs of `size` bytes in a row, after a poll or as who is about to sleep: is that polling? */
static void cmd_bulk(uint32_t n, size_t size, bool sleepy)
{
	mg_time before;

	mg_device_lock(t.dev);
	mg_net_poll(t.dev);
	if (sleepy)
		mg_note_sleep(t.dev);
	before = t.dev->last_poll;
	for (uint32_t i = 0; i < n; i++)
		post_send(IBV_WR_RDMA_WRITE, i, size, i * size);
	printf("counts %d\n", t.dev->last_poll != before);
	mg_device_unlock(t.dev);
	fflush(stdout);
	for (uint32_t done = 0; done < n;) {
		struct ibv_wc wc[16];

		mg_device_lock(t.dev);
		mg_net_poll(t.dev);
		done += (uint32_t)mg_cq_poll(t.cq, 16, wc);
		mg_device_unlock(t.dev);
	}
	printf("done\n");
}

static void *spin(void *arg)
{
	(void)arg;
	while (t.spin) {
		mg_device_lock(t.dev);
		mg_net_poll(t.dev);
		mg_device_unlock(t.dev);
	}
	return NULL;
}

/* Seconds until the alarm that is set, 0: there is none. */
static void cmd_left(void)
{
	struct itimerval left;

	getitimer(ITIMER_REAL, &left);
	printf("left %ld\n", (long)left.it_value.tv_sec + (left.it_value.tv_usec > 0));
}

static void cmd_spin(bool on)
{
	if (on) {
		t.spin = true;
		pthread_create(&t.spinner, NULL, spin, NULL);
	} else {
		t.spin = false;
		pthread_join(t.spinner, NULL);
	}
	printf("spinning %d\n", on);
}

static void cmd_counters(void)
{
	mg_device_lock(t.dev);
	printf("counters");
	for (int i = 0; i < MG_CNT_MAX; i++)
		printf(" %s=%llu", mg_counter_name[i], (unsigned long long)mg_counter_get(t.dev->engine, i));
	printf("\n");
	mg_device_unlock(t.dev);
}

/* What a child sees: no descriptor of the device, calls that return at once. */
static void cmd_fork(void)
{
	int before = t.dev->net->sock[MG_V4].fd, wake = t.dev->wake_fd, status = 0;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		bool ok = t.dev->forked && fcntl(before, F_GETFD) < 0 && fcntl(wake, F_GETFD) < 0;

		mg_device_lock(t.dev);
		ok = ok && mg_net_poll(t.dev) == 0;
		mg_net_flush(t.dev, 0);
		mg_device_unlock(t.dev);
		mg_device_put(t.dev);
		_exit(ok ? 0 : 1);
	}
	waitpid(pid, &status, 0);
	printf("child %d\n", status);
}

/* A child opens a device of its own, at another address, while the parent keeps its. */
static void cmd_childopen(const char *addr)
{
	int status = 0;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		struct mg_device *dev;

		setenv("MIGROCE_ADDR", addr, 1);
		dev = mg_device_get();
		if (!dev || dev == t.dev)
			_exit(1);
		mg_device_put(dev);
		_exit(0);
	}
	waitpid(pid, &status, 0);
	printf("child %d\n", status);
}

/* Receives posted, the CQ armed; then wait for its event without polling. */
static void cmd_event(const char *args)
{
	unsigned size, before = t.events;
	struct ibv_wc wc;
	int n = 0;

	sscanf(args, "%u", &size);
	mg_device_lock(t.dev);
	post_recv(0, size, 0);
	mg_cq_arm(t.cq, false);
	mg_device_unlock(t.dev);
	printf("armed\n");
	fflush(stdout);
	for (unsigned i = 0; i < POLL_SECONDS * 1000 && t.events == before; i++)
		usleep(1000);
	if (t.events == before)
		die("event", ETIMEDOUT);
	mg_device_lock(t.dev);
	n = mg_cq_poll(t.cq, 1, &wc);
	mg_device_unlock(t.dev);
	printf("event %d %d\n", n, n ? (int)wc.status : -1);
}

static void close_all(void)
{
	mg_device_lock(t.dev);
	mg_qp_destroy(t.qp);
	if (t.second)
		mg_qp_destroy(t.second);
	mg_cq_destroy(t.cq);
	mg_mr_destroy(t.mr);
	mg_pd_destroy(t.pd);
	mg_device_unlock(t.dev);
	mg_device_put(t.dev);
	free(t.buf);
}

static void fill_send_half(unsigned size)
{
	for (size_t k = 0; k < size; k++)
		t.buf[k] = pattern(0, k);
	printf("filled\n");
}

int main(void)
{
	char line[512];

	open_all();
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		unsigned a = 0, b = 0, c = 0;
		char cmd[16] = "";
		int at = 0;

		sscanf(line, "%15s %n", cmd, &at);
		sscanf(line + at, "%u %u %u", &a, &b, &c);
		if (!strcmp(cmd, "connect"))
			cmd_connect(t.qp, line + at);
		else if (!strcmp(cmd, "twin"))
			cmd_twin();
		else if (!strcmp(cmd, "connect-twin"))
			cmd_connect(t.second, line + at);
		else if (!strcmp(cmd, "send")) /* count size */
			run(IBV_WR_SEND, a, 0, b);
		else if (!strcmp(cmd, "recv"))
			run(IBV_WR_SEND, 0, a, b);
		else if (!strcmp(cmd, "both"))
			run(IBV_WR_SEND, a, a, b);
		else if (!strcmp(cmd, "write"))
			run(IBV_WR_RDMA_WRITE, a, 0, b);
		else if (!strcmp(cmd, "read"))
			run(IBV_WR_RDMA_READ, a, 0, b);
		else if (!strcmp(cmd, "fill"))
			fill_send_half(a);
		else if (!strcmp(cmd, "check")) {
			mg_device_lock(t.dev); /* after what the progress thread has written */
			check(0, a, 0);
			mg_device_unlock(t.dev);
			printf("same\n");
		} else if (!strcmp(cmd, "event"))
			cmd_event(line + at);
		else if (!strcmp(cmd, "bulk")) /* count size sleepy */
			cmd_bulk(a, b, c);
		else if (!strcmp(cmd, "alarm"))
			printf("before %u\n", alarm(a));
		else if (!strcmp(cmd, "left"))
			cmd_left();
		else if (!strcmp(cmd, "spin"))
			cmd_spin(a);
		else if (!strcmp(cmd, "counters"))
			cmd_counters();
		else if (!strcmp(cmd, "fork"))
			cmd_fork();
		else if (!strcmp(cmd, "childopen")) {
			line[strcspn(line, "\n")] = '\0';
			cmd_childopen(line + at);
		} else if (!strcmp(cmd, "exit"))
			exit(0); /* without closing anything */
		else if (!strcmp(cmd, "quit"))
			break;
		else
			printf("error what is %s\n", cmd);
		fflush(stdout);
	}
	close_all();
	printf("closed\n");
	return 0;
}
